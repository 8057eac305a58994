import functools

import cases
import pytest
import runs
import torch
from kills import CutOffError, Kill, assert_equal, options
from peft import LoraConfig
from torch import nn

from hbat.model.adapters import kept_form


def test_a_parameter_that_is_cast_while_loading_stays_in_its_precision_and_memory():
    model = nn.Linear(3, 2).bfloat16()
    memory, loaded = model.weight.data, torch.arange(6.0).reshape(2, 3)
    with kept_form(model):
        model.weight.data = loaded
    assert model.weight.data_ptr() == memory.data_ptr()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight.float(), loaded)


def test_what_keeps_its_precision_is_left_alone():
    model = nn.Linear(3, 2)
    other = torch.ones(2, 3)
    with kept_form(model):
        model.weight.data = other
        model.register_parameter("new", nn.Parameter(torch.ones(2).bfloat16()))
    assert model.weight.data_ptr() == other.data_ptr()
    assert model.new.dtype == torch.bfloat16


def test_what_is_frozen_stays_frozen():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with kept_form(model):
        model.requires_grad_(True)
    assert not model.bias.requires_grad
    assert model.weight.requires_grad


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.parametrize(
    ("stage", "freeze"),
    [
        pytest.param(2, 0.0, id="in SFT-0.0", marks=pytest.mark.slow),
        pytest.param(2, 0.5, id="in SFT-0.5", marks=pytest.mark.slow),
        pytest.param(3, 0.0, id="in DPO-0.0", marks=pytest.mark.slow),
        pytest.param(3, 0.5, id="in DPO-0.5"),
    ],
)
def test_an_adapter_resumes_from_a_checkpoint(stage, freeze, tmp_path):
    build = functools.partial(cases.lora_llama, dropout=0.1)
    check_resumed(build, stage, tmp_path, ewc={"strength": 1.0, "freeze": freeze})


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.slow
def test_an_adapter_that_takes_a_part_of_the_base_resumes_on_the_same_rest(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    check_resumed(functools.partial(cases.random_adapter, adapter), 3, tmp_path, ewc={"strength": 1.0})


def check_resumed(build, stage, folder, **changes):
    settings = options("carry", save_steps=1) | changes
    whole = runs.train(build(), folder / "whole", **settings)
    with pytest.raises(CutOffError):
        runs.train(build(), folder / "cut", callbacks=[Kill(stage, "step", 2)], **settings)
    assert_equal(runs.train(build(), folder / "cut", resume=True, **settings), whole)
