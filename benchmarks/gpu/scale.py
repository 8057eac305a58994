"""What the GPU benchmarks share: sizes, models with random weights, and measurement."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from workload import RESULTS, byte_tokenizer, status  # in the parent folder


@dataclass(frozen=True)
class Scale:
    """Sizes of model and batches."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    letters: int  # letters, that is tokens, of each of the two texts of a sequence
    batch: int  # sequences per step: rows of SFT, and two for each pair of DPO
    steps: int  # optimizer steps per stage
    rank: int  # of the adapter
    full_layers: int  # layers of the fully trained model in the benchmark of the penalty


#: `7b` has the shape of Llama 2 7B (6.7e9 parameters) and sequences of 1024 tokens.
SCALES = {
    "7b": Scale(4096, 11008, 32, 32, 32000, letters=511, batch=4, steps=12, rank=16, full_layers=6),
    "toy": Scale(64, 128, 2, 4, 300, letters=7, batch=4, steps=2, rank=4, full_layers=2),
}


def parser_of(document: str) -> argparse.ArgumentParser:
    """A parser with the options of every GPU benchmark."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy size (always without a GPU)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs per variant (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    return parser


def scale_name(*, toy: bool) -> str:
    """Return the key of `SCALES` to use."""
    if not toy and not torch.cuda.is_available():
        print("No GPU: toy size on the CPU. Its numbers mean nothing.")
    return "7b" if torch.cuda.is_available() and not toy else "toy"


def device() -> torch.device:
    """The GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> dict[str, Any]:
    """Name and memory of the device, and versions of CUDA and bitsandbytes."""
    try:
        quantization = version("bitsandbytes")
    except PackageNotFoundError:
        quantization = None
    found = {"device": "cpu", "cuda": torch.version.cuda, "bitsandbytes": quantization}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
    return found


# --- models ----------------------------------------------------------------------------------------------------------


def random_llama(scale: Scale, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights, built on the device."""
    config = LlamaConfig(
        hidden_size=scale.hidden, intermediate_size=scale.intermediate, num_hidden_layers=layers,
        num_attention_heads=scale.heads, num_key_value_heads=scale.heads, vocab_size=scale.vocabulary,
        max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device():
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def save_base(scale: Scale, folder: Path) -> None:
    """Save a model and its tokenizer, for bitsandbytes to quantize on loading."""
    random_llama(scale, scale.layers, torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    release()


def load_with_adapter(folder: Path, scale: Scale, *, quantized: bool) -> Any:
    """Load the model in bfloat16 or 4 bits, with an adapter on all linear layers."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=four_bits if quantized else None
    )
    if not quantized:
        model = model.to(device())
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=scale.rank, lora_alpha=2 * scale.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    return get_peft_model(model, adapter)


def release() -> None:
    """Free the memory of deleted models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- measurement -----------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(action: Callable[[], object], repeats: int) -> float:
    """Least seconds of an action, after one uncounted call."""
    action()
    times = []
    for _ in range(repeats):
        start = now()
        action()
        times.append(now() - start)
    return min(times)


class Meter(TrainerCallback):
    """Objective, seconds of the steps after the first, and peak bytes (of GPU or process) of every `train()`."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._start = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Reset the peak."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def on_step_end(self, args: Any, state: Any, *_: object, **__: object) -> None:
        """Start the clock after the first step, which selects kernels and allocates memory."""
        if state.global_step == 1:
            self._start = now()

    def on_train_end(self, args: Any, *_: object, **__: object) -> None:
        """Record the training."""
        objective = type(args).__name__.removesuffix("Config").lower()
        seconds = now() - self._start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")
        self.stages.append({"objective": objective, "seconds": seconds, "peak": peak})
