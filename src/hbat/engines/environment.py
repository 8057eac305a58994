"""TODO: say what this file owns."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

_ENVIRONMENT = ("ACCELERATE_", "FSDP_")  # transformers < 5 leaks precision and engine of any configuration here


def forget_deepspeed() -> None:
    """Let the host forget the configuration of DeepSpeed that it saw last, until it sees the next one.

    With one of ZeRO-3 it would make every model that it loads partitioned, and take every model for such a one.
    """
    unset_hf_deepspeed_config()


@contextmanager
def kept_environment() -> Iterator[None]:
    """Take back what building trainer arguments leaves in the environment and in transformers."""
    before = _environment()
    try:
        yield
    finally:
        for key in _environment().keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)
        forget_deepspeed()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith(_ENVIRONMENT)}
