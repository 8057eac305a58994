"""What FSDP2 refuses at construction. What it trains is tested in `distributed/test_fsdp2.py`."""

from types import SimpleNamespace

import cases
import pytest
import runs
from accelerate import FullyShardedDataParallelPlugin
from refused import refused, track
from torch.nn import Linear

from hbat.config.ewc import EWCConfig
from hbat.engines.fsdp2 import FSDP2, fsdp_version, keep_sharded, require_supported
from hbat.engines.loaded_shards import LoadedShards
from hbat.ppo.engine import shard
from hbat.ppo.networks.policy_and_critic import Critic

ASKED = {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}
UNTESTED = {
    "untested objective": (track("grpo", engines=("ddp",), **ASKED), None),
    "precomputed reference": (track("dpo", precompute_ref_log_probs=True, **ASKED), None),
    "untested optimizer": (track(optim="adamw_bnb_8bit", **ASKED), None),
    "compilation": (track(torch_compile=True, **ASKED), None),
    "Fisher of samples under FSDP2": (track(**ASKED), EWCConfig(source="fisher", estimator="empirical")),
}


@pytest.mark.parametrize("name", UNTESTED)
@pytest.mark.parametrize("engine", [FSDP2, LoadedShards])
def test_what_was_not_tested_on_sharded_parameters_is_refused(engine, name):
    wrong, ewc = UNTESTED[name]
    with refused(name):
        engine().check([track("ppo", **ASKED), wrong], ewc)


def test_paged_optimizers_are_refused_like_those_in_eight_bits():
    with refused("untested optimizer"):
        FSDP2().check([track(optim="paged_adamw_32bit", **ASKED)], None)


@pytest.mark.parametrize("option", ["bf16", "fp16", "fsdp_config"])
def test_objectives_that_would_shard_in_different_ways_are_refused(option):
    with pytest.raises(ValueError, match=rf"`{option}` differs between the objectives.*'dpo': 1"):
        FSDP2().check([track("sft", **ASKED), track("dpo", **ASKED | {option: 1})], None)


def test_a_single_process_is_refused(tmp_path, monkeypatch):
    for key, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(key, value)
    with refused("FSDP2 in one process"):
        runs.build_run(cases.tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("args", "version"),
    [
        (None, None),
        (SimpleNamespace(fsdp=""), None),
        (SimpleNamespace(deepspeed=None), None),
        (SimpleNamespace(fsdp=[], fsdp_plugin_args={}), None),
        (SimpleNamespace(fsdp="full_shard"), 1),
        (SimpleNamespace(**ASKED), 2),
    ],
)
def test_the_version_of_fsdp_is_that_of_the_arguments(args, version):
    assert fsdp_version(args) == version


def test_what_an_earlier_trainer_of_the_process_left_is_no_launch(monkeypatch):
    """accelerate says in the environment that a trainer used FSDP; which, the trainer's arguments said."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp_version() is None
    assert fsdp_version(SimpleNamespace(**ASKED)) == 2
    assert fsdp_version(SimpleNamespace(fsdp=None)) == 1  # of which transformers would make the first version


# --- how a trainer would shard ---------------------------------------------------------------------------------------


def trainer_with(plugin, **args):
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type="MULTI_CPU"),
        args=SimpleNamespace(**{"torch_compile": False, "optim": SimpleNamespace(value="sgd")} | args),
    )


def plugin(**options):
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"} | options)


PLUGINS = {
    "FSDP1": {"fsdp_version": 1},
    "FSDP with offload": {"cpu_offload": True},
    "FSDP2 with activation checkpointing": {"activation_checkpointing": True},
    "FSDP2 with an optimizer without state": {"state_dict_type": "FULL_STATE_DICT"},
}


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("act", [require_supported, keep_sharded])
def test_ways_to_shard_that_are_not_supported_are_refused(act, name):
    with refused(name):
        act(trainer_with(plugin(**PLUGINS[name])))


def test_compilation_is_refused():
    require_supported(trainer_with(plugin()))
    with refused("compilation"):
        require_supported(trainer_with(plugin(), torch_compile=True))


def test_a_mesh_of_several_dimensions_is_refused():
    trainer = trainer_with(plugin())
    trainer.accelerator.torch_device_mesh = SimpleNamespace(ndim=1)
    require_supported(trainer)
    trainer.accelerator.torch_device_mesh = SimpleNamespace(ndim=2)
    with refused("FSDP2 on a mesh"):
        require_supported(trainer)


def test_an_engine_that_accelerate_ignores_is_refused():
    with refused("FSDP2 left aside"):
        require_supported(trainer_with(None))


def test_a_separate_critic_is_refused():
    trainer = trainer_with(plugin())
    trainer.is_fsdp_enabled = True
    trainer.model = SimpleNamespace(policy=cases.tiny_llama(), critic=Critic(Linear(2, 1), trunk=Linear(2, 2)))
    with refused("separate critic under FSDP2"):
        shard(trainer, None)


def test_only_sharded_models_are_kept_from_the_accelerator():
    trainer, given = trainer_with(plugin()), []
    trainer.accelerator.prepare = lambda *objects: given.extend(objects)
    keep_sharded(trainer)
    model = Linear(2, 2)
    trainer.accelerator.prepare(model)
    assert given == [model]
