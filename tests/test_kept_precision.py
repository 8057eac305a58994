import torch
from torch import nn

from hbat.kept_precision import kept_precision


def test_a_parameter_that_is_cast_while_loading_stays_in_its_precision_and_memory():
    model = nn.Linear(3, 2).bfloat16()
    memory, loaded = model.weight.data, torch.arange(6.0).reshape(2, 3)
    with kept_precision(model):
        model.weight.data = loaded
    assert model.weight.data_ptr() == memory.data_ptr()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight.float(), loaded)


def test_what_keeps_its_precision_is_left_alone():
    model = nn.Linear(3, 2)
    other = torch.ones(2, 3)
    with kept_precision(model):
        model.weight.data = other
        model.register_parameter("new", nn.Parameter(torch.ones(2).bfloat16()))
    assert model.weight.data_ptr() == other.data_ptr()
    assert model.new.dtype == torch.bfloat16
