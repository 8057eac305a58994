"""Errors of reading a checkpoint name it, all others stay; `test_planted_files.py` has real files."""

import pytest
import torch

from hbat.stages.checkpoints import named_checkpoint
from hbat.state.manifest import RunStateError


def _load_rng_state(error):  # named as transformers' own
    raise error


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_reason():
    message = r"run/checkpoint-3 cannot be resumed from \(ValueError: bad magic number\)\. Remove this folder"
    with pytest.raises(RunStateError, match=message) as raised, named_checkpoint("run/checkpoint-3"):
        _load_rng_state(ValueError("bad  magic\nnumber. And more."))
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_too_little_memory_and_a_signal_are_no_fault_of_the_checkpoint(error):
    with pytest.raises(type(error)), named_checkpoint("run/checkpoint-3"):
        _load_rng_state(error)


def test_an_error_from_anywhere_else_stays_as_it_is():
    error = ValueError("a callback of the user")
    with pytest.raises(ValueError, match="a callback") as raised, named_checkpoint("run/checkpoint-3"):
        raise error
    assert raised.value is error
    with pytest.raises(ValueError, match="bad"), named_checkpoint(None):
        _load_rng_state(ValueError("bad"))
