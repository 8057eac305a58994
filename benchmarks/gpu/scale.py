"""What the benchmarks on a GPU share: sizes, models of random weights, and measurement on the device that is there."""

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
from workload import RESULTS, byte_tokenizer, status  # lies in the folder above


@dataclass(frozen=True)
class Scale:
    """Sizes of model and batches.

    Attributes:
        hidden: Width.
        intermediate: Width within a block.
        layers: Depth.
        heads: Attention heads.
        vocabulary: Token types.
        letters: Letters, so tokens, of each of the two texts of a sequence.
        batch: Sequences in a step: rows of SFT, and two for each pair of DPO.
        steps: Optimizer steps of a stage.
        rank: Of the adapter.
        full_layers: Blocks of the model whose weights are all trained, in the benchmark of the penalty.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    letters: int
    batch: int
    steps: int
    rank: int
    full_layers: int


#: `7b` has the shape of Llama 2 7B (6.7e9 parameters) and sequences of 1024 tokens.
SCALES = {
    "7b": Scale(4096, 11008, 32, 32, 32000, letters=511, batch=4, steps=12, rank=16, full_layers=6),
    "toy": Scale(64, 128, 2, 4, 300, letters=7, batch=4, steps=2, rank=4, full_layers=2),
}


def parser_of(document: str) -> argparse.ArgumentParser:
    """Begin a command line.

    Args:
        document: The script's docstring.

    Returns:
        A parser with the options that all of these benchmarks have.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy size, which is taken without a GPU in any case")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each variant (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    return parser


def scale_name(*, toy: bool) -> str:
    """Choose the size.

    Args:
        toy: Whether the small one is asked for.

    Returns:
        A key of `SCALES`.
    """
    if not toy and not torch.cuda.is_available():
        print("No GPU: toy size on the CPU. Its numbers mean nothing.")
    return "7b" if torch.cuda.is_available() and not toy else "toy"


def device() -> torch.device:
    """Find the device.

    Returns:
        The GPU, or the CPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> dict[str, Any]:
    """Describe the device.

    Returns:
        Its name and memory, CUDA's version, and that of bitsandbytes.
    """
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
    """A model of random weights, made on the device.

    Args:
        scale: Its sizes.
        layers: Its depth.
        dtype: Of its weights.

    Returns:
        The model.
    """
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
    """Put a model and its tokenizer on disk, from where bitsandbytes quantises it.

    Args:
        scale: Its sizes.
        folder: Where to.
    """
    random_llama(scale, scale.layers, torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    release()


def load_with_adapter(folder: Path, scale: Scale, *, quantized: bool) -> Any:
    """Load the model and put an adapter on all its linear layers.

    Args:
        folder: Where it lies.
        scale: Its sizes.
        quantized: Whether in 4 bits (NF4, double quantisation), or in bfloat16.

    Returns:
        The PeftModel on the device.
    """
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
    """Give the memory of dead models back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- measurement -----------------------------------------------------------------------------------------------------


def now() -> float:
    """Read the clock once the device has done what it was told.

    Returns:
        Seconds.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(action: Callable[[], object], repeats: int) -> float:
    """Time an action.

    Args:
        action: What to time.
        repeats: How often, after a first time that is not counted.

    Returns:
        Least seconds.
    """
    action()
    times = []
    for _ in range(repeats):
        begun = now()
        action()
        times.append(now() - begun)
    return min(times)


class Meter(TrainerCallback):
    """Measures each training of the trainers that it is passed to.

    Attributes:
        stages: For each `train()`: its `objective`, `seconds` of its steps after the first, and `peak` memory in
            bytes, allocated on the GPU or resident in main memory.
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._begun = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Forget the peak so far."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def on_step_end(self, args: Any, state: Any, *_: object, **__: object) -> None:
        """Start the clock after the first step, in which kernels are chosen and memory is taken."""
        if state.global_step == 1:
            self._begun = now()

    def on_train_end(self, args: Any, *_: object, **__: object) -> None:
        """Keep what was measured."""
        objective = type(args).__name__.removesuffix("Config").lower()
        seconds = now() - self._begun
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")
        self.stages.append({"objective": objective, "seconds": seconds, "peak": peak})
