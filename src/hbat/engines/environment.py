"""Global state that transformers and accelerate keep: DeepSpeed's configuration, and variables of the environment."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

_PREFIXES = ("ACCELERATE_", "FSDP_")  # transformers < 5 sets precision and engine of any TrainingArguments here


def forget_deepspeed() -> None:
    """Clear transformers' global DeepSpeed configuration: with one of ZeRO-3 every model it loads is partitioned."""
    unset_hf_deepspeed_config()


@contextmanager
def kept_environment() -> Iterator[None]:
    """Undo what building TrainingArguments leaves in the environment and in transformers."""
    before = _variables()
    try:
        yield
    finally:
        for name in _variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        forget_deepspeed()


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Hide what the libraries deprecate of each other inside the block: nobody who runs them can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|peft|transformers|trl)\.")
        yield
