"""What the benchmarks share: models and rows built in memory from seeds, and measurement."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")  # noqa: S106


def llama(hidden: int, layers: int, vocabulary: int = 258, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights in float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
            bos_token_id=None, tie_word_embeddings=True,
        )
    )  # fmt: skip


def rows(count: int, length: int, *, preference: bool, seed: int) -> Dataset:
    """Rows of random letters, `length` per text."""
    chance = random.Random(seed)

    def text() -> str:
        return "".join(chance.choices("abcdefgh ", k=length)).strip() or "a"

    if preference:
        return Dataset.from_list([
            {"prompt": text(), "chosen": " a" + text(), "rejected": " b" + text()} for _ in range(count)
        ])
    return Dataset.from_list([{"prompt": text(), "completion": " " + text()} for _ in range(count)])


def status(name: str) -> int:
    """Memory of this process in bytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def in_turn(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of `repeats` runs of each variant, in turn after one uncounted run."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if repeat:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["cpu"].append(time.process_time() - cpu)
    return times


def ratio(times: dict[str, dict[str, list[float]]], name: str, base: str, clock: str) -> float:
    """Median over the repeats of the time of a variant over that of `base`."""
    return statistics.median(a / b for a, b in zip(times[name][clock], times[base][clock], strict=True))


def about() -> dict[str, Any]:
    """Versions of the packages, and the number of torch threads."""
    packages = ("torch", "transformers", "trl", "accelerate", "peft")
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    return found | {package: version(package) for package in packages}


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a result and the versions it was measured with to a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"about": about(), **result}, indent=1) + "\n", encoding="utf-8")
    root = Path(__file__).parent.parent
    print(f"saved to {file.relative_to(root) if file.is_relative_to(root) else file}")
