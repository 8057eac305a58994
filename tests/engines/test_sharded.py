"""Tensors that are whole are their own parts. What processes share is tested in `test_fsdp2.py`."""

import cases
import pytest
import torch

from hbat.engines.sharded import (
    as_part,
    first_not_finite,
    give_back,
    is_sharded,
    is_shared,
    part_of,
    parts_of,
    shared_as,
    smallest,
    summed,
    whole_of,
    whole_state,
    whole_tensors,
)


def test_a_whole_tensor_is_its_own_part():
    tensor, other = torch.ones(3), torch.zeros(3)
    assert not is_shared(tensor)
    assert part_of(tensor) is whole_of(tensor) is shared_as(tensor, other) is as_part(tensor, other) is tensor
    assert parts_of({"a": tensor, "b": 2.0}) == {"a": tensor, "b": 2.0}


def test_numbers_about_whole_tensors_are_what_they_are():
    values, tensors = torch.tensor([1.0, torch.nan]), [torch.ones(2), torch.ones(3)]
    assert summed(values, tensors) is values
    assert smallest(values, tensors) is values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    tensors = {"a": torch.ones(2), "b": torch.tensor([0.0, value]), "c": torch.tensor([value])}
    assert first_not_finite(tensors) == "b"
    assert first_not_finite({"a": tensors["a"], "none": torch.empty(0)}) is None
    assert first_not_finite({}) is None


def test_only_those_that_keep_whole_tensors_get_them():
    tensors = {"a": torch.ones(2)}
    assert whole_tensors(tensors, keep=True)["a"] is tensors["a"]
    assert whole_tensors(tensors, keep=False) == {}


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_of_a_whole_model_is_its_own(tied):
    model = cases.tiny_llama(tied=tied)
    give_back(model)
    assert not is_sharded(model)
    state, expected = whole_state(model, keep=True), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    pointers = {tensor.data_ptr() for tensor in state.values()}
    assert len(pointers) == len(state) - tied
    assert whole_state(model, keep=False) == {}
