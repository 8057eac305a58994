"""Models that transformers loads in shards. What they train is tested in `distributed/test_loaded_shards.py`."""

from types import SimpleNamespace

import torch
from refused import track
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hbat.engines.loaded_shards import LoadedShards, is_loaded_in_shards, unsupported_ways, written_as_whole


def in_shards(**config):
    """What is asked of a model that transformers loaded in shards."""
    model = SimpleNamespace(is_distributed_loading_by_transformers=True)
    model.modules = lambda: [object.__new__(FSDPModule)]
    model.config = SimpleNamespace(distributed_config=SimpleNamespace(fsdp_size=2, **config))
    return model


def test_only_a_model_that_transformers_sharded_counts():
    assert is_loaded_in_shards(in_shards())
    assert not is_loaded_in_shards(nn.Linear(1, 1))


def test_ways_beside_sharding_are_named():
    assert unsupported_ways(in_shards(tp_size=1, pp_size=1)) == []
    found = unsupported_ways(in_shards(dp_replicate_size=2, fsdp_cpu_offload=True))
    assert found == ["dp_replicate_size=2", "fsdp_cpu_offload=True"]


def test_the_model_is_not_sharded_again_and_its_trainers_write_no_checkpoints():
    engine = LoadedShards()
    engine.check([track()], None)
    engine.place(nn.Linear(1, 1), None)
    for whole, changes in ((False, {"save_strategy": "no"}), (True, {})):
        with engine.building(SimpleNamespace(save_only_model=whole), evaluating=False) as found:
            assert found == changes


def test_a_stage_leaves_no_gradient_hook_that_holds_its_trainer():
    engine, model, calls = LoadedShards(), nn.Linear(1, 1), []
    with engine.stage([model]):
        model.weight.register_post_accumulate_grad_hook(lambda _: calls.append("trainer's"))
        model.weight._replicated_grad_hook_registered = True  # noqa: SLF001 - as transformers marks it
        model.bias.register_post_accumulate_grad_hook(lambda _: calls.append("user's"))
    model(torch.ones(1)).sum().backward()
    assert calls == ["user's"]


def test_its_configuration_is_written_as_that_of_a_whole_model():
    model = in_shards()
    before = model.config.distributed_config
    with written_as_whole(model):
        assert model.config.distributed_config is None
    assert model.config.distributed_config is before
    whole = nn.Linear(1, 1)
    with written_as_whole(whole):
        pass
