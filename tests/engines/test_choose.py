"""Which engine arguments and model ask for."""

from types import SimpleNamespace

import cases
import pytest
import torch
from refused import refused, track
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hbat.engines.choose import choose_engine, engine_for, make_whole
from hbat.engines.deepspeed.engine import DeepSpeed
from hbat.engines.engine import Engine
from hbat.engines.fsdp2 import FSDP2
from hbat.engines.loaded_shards import LoadedShards

ZERO_2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}


class Loaded(nn.Linear):
    """What is asked of a model that transformers loaded in shards."""

    is_distributed_loading_by_transformers = True

    def modules(self):
        return iter([object.__new__(FSDPModule)])


@pytest.mark.parametrize(
    ("options", "model", "kind"),
    [
        ({}, None, Engine),
        ({}, nn.Linear(1, 1), Engine),
        (ZERO_2, None, DeepSpeed),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}, None, FSDP2),
        ({}, Loaded(1, 1), LoadedShards),
    ],
)
def test_an_engine_is_found_by_arguments_and_model(options, model, kind):
    assert type(engine_for(track(**options).args, model)) is kind


def test_an_engine_of_accelerate_launch_is_found(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert type(engine_for(SimpleNamespace())) is DeepSpeed


def test_a_run_without_an_engine_trains_in_one_process(caplog):
    engine = choose_engine([track(), track("dpo")], cases.tiny_llama(), None)
    assert type(engine) is Engine
    assert not caplog.text


def test_an_engine_of_one_objective_is_that_of_the_run():
    with pytest.raises(NotImplementedError, match=r"set for \['dpo'\] only"):
        choose_engine([track(), track("dpo", **ZERO_2)], cases.tiny_llama(), None)


def test_an_engine_that_cannot_replay_rows_is_refused():
    """Nothing else of it is: without replay it is chosen."""
    tracks = [track(**ZERO_2), track("dpo", **ZERO_2)]
    assert type(choose_engine(tracks, cases.tiny_llama(), None)) is DeepSpeed
    with refused("replay"):
        choose_engine(tracks, cases.tiny_llama(), None, replays=True)
    assert type(choose_engine([track(), track("dpo")], cases.tiny_llama(), None, replays=True)) is Engine


def test_a_run_whose_stages_cannot_resume_says_so(caplog):
    engine = choose_engine([track(**ZERO_2), track("dpo", **ZERO_2)], cases.tiny_llama(), None)
    assert not engine.resumes_inside_stage
    assert "a stage that is cut off begins again" in caplog.text


def test_a_whole_model_stays_as_it_is():
    model = nn.Linear(2, 2)
    before = model.weight.data_ptr()
    make_whole(model)
    assert model.weight.data_ptr() == before
    assert model.weight.shape == torch.Size([2, 2])
