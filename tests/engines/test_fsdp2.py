"""What cannot be trained under FSDP is refused at construction. What can is tested in `test_fsdp2.py`."""

from types import SimpleNamespace

import cases
import pytest
import runs
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.nn import Linear

from hbat.engines.fsdp2 import keep_sharded, require_supported, sharding
from hbat.objectives.built_in import build_sections, resolve
from hbat.ppo.fsdp2 import shard_policy_and_critic
from hbat.ppo.networks.policy_and_critic import SeparateCritic

#: What `accelerate launch` says of FSDP2.
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


CPU = {"use_cpu": True, "bf16": False}
REFUSED = {
    "objective under FSDP2": (
        {"objectives": ["sft", "grpo"], "grpo": CPU}, r"'grpo' cannot be trained.*`ppo` or `dpo`",
    ),
    "precomputed reference under FSDP2": (
        {"dpo": {"precompute_ref_log_probs": True}}, r"`dpo\.precompute_ref_log_probs`.*Leave",
    ),
    "8-bit optimizers under FSDP2": (
        {"sft": {"optim": "adamw_bnb_8bit"}}, r"`sft\.optim` is 'adamw_bnb_8bit'.*Take 'adamw_torch'",
    ),
    "anchor on the CPU": ({"ewc": {"anchor_device": "cpu"}}, r"`anchor_device: cpu` is not.*under FSDP2.*DDP"),
    "Fisher of samples under FSDP2": (
        {"ewc": {"source": "fisher", "estimator": "empirical"}}, r"`ewc\.estimator: emp.*Set `ewc\.estimator: gnb`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_shards_is_refused(options, message, tmp_path, monkeypatch):
    config = runs.config(tmp_path, **options)
    objectives = resolve(config)
    sections = build_sections(objectives, config)  # before the host reads the environment
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(NotImplementedError, match=message):
        sharding(config, objectives, sections)


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_shards_is_refused_for_a_model_that_came_in_shards(options, message, tmp_path):
    config = runs.config(tmp_path, **options)
    objectives = resolve(config)
    with pytest.raises(NotImplementedError, match=message):
        sharding(config, objectives, build_sections(objectives, config), in_shards())


def test_a_model_that_came_in_shards_is_not_compiled(tmp_path):
    config = runs.config(tmp_path, sft={"torch_compile": True})
    objectives = resolve(config)
    with pytest.raises(NotImplementedError, match=r"`torch_compile` is not supported.*Leave it out"):
        sharding(config, objectives, build_sections(objectives, config), in_shards())


def test_a_model_that_came_in_shards_is_not_sharded_again_and_its_stages_begin_anew(tmp_path, caplog):
    config = runs.config(tmp_path)
    objectives = resolve(config)
    assert sharding(config, objectives, build_sections(objectives, config), in_shards()) is None
    assert "one that is cut off begins anew" in caplog.text


def in_shards():
    """What is asked of a model that transformers loaded in shards."""
    model = SimpleNamespace(is_distributed_loading_by_transformers=True)
    model.modules = lambda: [object.__new__(FSDPModule)]
    return model


def test_a_single_process_is_told_that_it_is_alone(tmp_path, monkeypatch):
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(NotImplementedError, match="there is a single process"):
        runs.build_run(cases.tiny_llama(), tmp_path)


def test_sections_that_would_shard_in_different_ways_are_refused():
    sections = {
        name: SimpleNamespace(fsdp=True, fsdp_plugin_args={"fsdp_version": 2}, bf16=bf16)
        for name, bf16 in (("sft", True), ("dpo", False))
    }
    with pytest.raises(ValueError, match=r"`bf16` differs between the sections.*'dpo': False"):
        sharding(SimpleNamespace(ewc=None), [], sections)


def test_nothing_is_sharded_where_nobody_asks_for_it():
    assert sharding(SimpleNamespace(ewc=None), [], {"sft": SimpleNamespace(fsdp=None, deepspeed=None)}) is None


PLUGINS = {
    "FSDP1": ({"fsdp_version": 1}, r"FSDP1 .* not supported.*`fsdp_version: 2`"),
    "FSDP with offload": ({"cpu_offload": True}, r"FSDP with offload .* not supported"),
    "FSDP2 with activation checkpointing": (
        {"activation_checkpointing": True}, r"activation checkpointing is not.*`gradient_checkpointing",
    ),
    "FSDP2 with an optimizer without state": (
        {"state_dict_type": "FULL_STATE_DICT"}, r"`optim: sgd` is not supported.*SHARDED_STATE_D",
    ),
}  # fmt: skip


#: What else is refused here, or in `test_fsdp2.py`.
OTHERS = {
    "FSDP2 in one process", "FSDP2 left aside", "FSDP2 on a mesh", "FSDP2 with compilation",
    "separate critic under FSDP2",
}  # fmt: skip


def trainer_with(plugin, **args):
    kind = SimpleNamespace(value="sgd")
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type="MULTI_CPU"),
        args=SimpleNamespace(**{"torch_compile": False, "optim": kind} | args),
    )


@pytest.mark.parametrize(("options", "message"), PLUGINS.values(), ids=PLUGINS)
@pytest.mark.parametrize("act", [require_supported, keep_sharded])
def test_ways_to_shard_that_are_not_supported_are_refused(act, options, message):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"} | options)
    with pytest.raises(NotImplementedError, match=message):
        act(trainer_with(plugin))


def test_compilation_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    require_supported(trainer_with(plugin))
    with pytest.raises(NotImplementedError, match=r"`torch_compile` is not supported.*Leave it out"):
        require_supported(trainer_with(plugin, torch_compile=True))


def test_a_mesh_of_several_dimensions_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    trainer = trainer_with(plugin)
    trainer.accelerator.torch_device_mesh = SimpleNamespace(ndim=1)
    require_supported(trainer)
    trainer.accelerator.torch_device_mesh = SimpleNamespace(ndim=2)
    with pytest.raises(NotImplementedError, match="mesh of several dimensions is not supported"):
        require_supported(trainer)


def test_a_critic_of_its_own_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    trainer = trainer_with(plugin)
    trainer.model = SimpleNamespace(policy=cases.tiny_llama(), critic=SeparateCritic(Linear(2, 2), Linear(2, 1)))
    with pytest.raises(NotImplementedError, match="Set `critic: shared`"):
        shard_policy_and_critic(trainer, None)


def test_an_engine_that_accelerate_left_aside_is_refused():
    with pytest.raises(NotImplementedError, match=r"trains with MULTI_CPU here: on a CPU it leaves FSDP aside"):
        require_supported(trainer_with(None))
