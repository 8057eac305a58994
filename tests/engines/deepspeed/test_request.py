"""What is asked of DeepSpeed, and what is refused of it. What is not is tested in `test_deepspeed.py`."""

import json
import os
from types import SimpleNamespace

import cases
import ppo_cases
import pytest
import runs
import torch
from runs import needs_kto
from support_table import ENGINES

from hbat import EWCCallback
from hbat.engines.checks import refuse_arguments
from hbat.engines.deepspeed.request import (
    drop_empty_groups,
    is_asked,
    left_aside,
    refuse_zero,
    require_trainable,
    zero_row,
)
from hbat.objectives.built_in import build_sections, resolve

LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
CPU = {"use_cpu": True, "bf16": False}

REFUSED = {
    "objective under DeepSpeed": (
        {"objectives": ["sft", "grpo"], "grpo": CPU}, r"'grpo' is not supported.*`sft`, `dpo` or `kto`",
    ),
    "optimizer under DeepSpeed": ({"sft": {"optim": "adafactor"}}, r"`sft\.optim` is 'adafactor'.*'adamw_torch'"),
    "precomputed reference under DeepSpeed": (
        {"dpo": {"precompute_ref_log_probs": True}}, r"`dpo\.precompute_ref_log_probs`.*Leave",
    ),
    "compilation under DeepSpeed": ({"dpo": {"torch_compile": True}}, r"`torch_compile` is not.*out of `dpo`"),
    "proximal steps under DeepSpeed": ({"ewc": {"method": "proximal"}}, r"`method: prox.*method: gradient`"),
    "anchor on the CPU": ({"ewc": {"anchor_device": "cpu"}}, r"`anchor_device: cpu` is not.*under DeepSpeed.*DDP"),
    "frozen tensors under DeepSpeed": ({"ewc": {"freeze": 0.5}}, r"`ewc\.freeze` is not.*Set it to 0"),
}  # fmt: skip
#: What else is refused here, or in `test_deepspeed.py`.
OTHERS = {
    "optimizer by DeepSpeed", "DeepSpeed for some objectives", "PPOTrainer under DeepSpeed",
    "EWCCallback alone under DeepSpeed",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` says of ZeRO-2, said after sections are built: the host would ask for DeepSpeed."""

    def say(**more):
        for key, value in (LAUNCHED | more).items():
            monkeypatch.setenv(key, value)

    return say


def built(folder, **options):
    config = runs.config(folder, **options)
    objectives = resolve(config)
    return config, objectives, build_sections(objectives, config)


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_deepspeed_is_refused(options, message, tmp_path, launched):
    asked = built(tmp_path, **options)
    require_trainable(*asked)
    launched()
    with pytest.raises(NotImplementedError, match=message):
        require_trainable(*asked)


@pytest.mark.parametrize("objectives", [["sft", "dpo"], pytest.param(["sft", "kto"], marks=needs_kto)])
def test_what_is_left_goes_with_it(objectives, tmp_path, launched):
    asked = built(tmp_path, objectives=objectives, kto=runs.section(), ewc={})
    launched()
    refuse_arguments()
    require_trainable(*asked)


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_an_optimizer_of_deepspeeds_own_is_refused(key, tmp_path, launched):
    asked = built(tmp_path)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"type": "AdamW"}}))
    launched(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(NotImplementedError, match=rf"configuration has \['{key}'\].*Leave it out"):
        require_trainable(*asked)


def test_deepspeed_in_some_sections_alone_is_refused(tmp_path):
    config, objectives, sections = built(tmp_path)
    sections["dpo"].deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(NotImplementedError, match=r"set for \['dpo'\] alone"):
        require_trainable(config, objectives, sections)


def test_ppo_alone_is_refused(tmp_path, launched):
    args = ppo_cases.arguments(tmp_path)
    launched()
    with pytest.raises(NotImplementedError, match=r"PPO is not supported under DeepSpeed.*FSDP2"):
        ppo_cases.PPOTrainer(
            cases.tiny_llama(), args, ppo_cases.prompts(), processing_class=cases.tiny_tokenizer(),
            reward_funcs=ppo_cases.letters,
        )  # fmt: skip


def test_a_callback_that_is_not_bound_is_refused(launched):
    launched()
    model = cases.tiny_llama()
    callback = EWCCallback(dict.fromkeys(dict(model.named_parameters()), 1.0))
    with pytest.raises(NotImplementedError, match=r"Call `callback\.bind\(trainer\)`"):
        callback.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), None, model=model)


def test_a_proximal_callback_is_refused(launched):
    launched()
    trainer = SimpleNamespace(args=SimpleNamespace(), model=cases.tiny_llama())
    with pytest.raises(NotImplementedError, match=r"Set `method: gradient`"):
        EWCCallback({}, method="proximal").bind(trainer)


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ({"zero_optimization": {"stage": 1}}, "DeepSpeed ZeRO-1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, "DeepSpeed ZeRO-2"),
        ({"zero_optimization": {"stage": 3}}, "DeepSpeed ZeRO-3"),
        ({"zero_optimization": {"stage": 0}}, "DeepSpeed without ZeRO"),
        ({}, "DeepSpeed without ZeRO"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "DeepSpeed with offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "DeepSpeed with offload"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "DeepSpeed with offload"),
    ],
)
def test_the_row_of_the_table_is_that_of_the_configuration(config, row, tmp_path):
    assert row in ENGINES
    assert zero_row(SimpleNamespace(deepspeed=config)) == row
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(config))
    assert zero_row(SimpleNamespace(deepspeed=str(file))) == row
    assert zero_row(SimpleNamespace(deepspeed=None, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))) == row


def test_the_row_of_a_launch_is_what_it_was_told(launched):
    launched()
    assert zero_row(None) == "DeepSpeed ZeRO-2"
    launched(ACCELERATE_DEEPSPEED_ZERO_STAGE="1", ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none")
    assert zero_row(None) == "DeepSpeed ZeRO-1"
    launched(ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu")
    assert zero_row(None) == "DeepSpeed with offload"


def asked(stage=2, **config):
    return SimpleNamespace(deepspeed={"zero_optimization": {"stage": stage}} | config)


BFLOAT16 = {"enabled": True}


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_is_taken_where_the_optimizer_steps_float32_weights(stage, launched):
    refuse_zero(asked(stage, bf16=BFLOAT16))
    refuse_zero(asked(stage, bf16=BFLOAT16, data_types={"grad_accum_dtype": "bf16"}))
    refuse_zero(SimpleNamespace(**vars(asked(stage, bf16={"enabled": "auto"})), bf16=True))
    launched(ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage), ACCELERATE_MIXED_PRECISION="bf16")
    refuse_zero(None)


def test_gradients_in_float32_are_taken_at_stage_2():
    refuse_zero(asked(2, bf16=BFLOAT16, data_types={"grad_accum_dtype": "fp32"}))
    with pytest.raises(NotImplementedError, match=r"has \['grad_accum_dtype'\] beside `bf16`.*ZeRO-2"):
        refuse_zero(asked(1, bf16=BFLOAT16, data_types={"grad_accum_dtype": "fp32"}))
    refuse_zero(asked(1, data_types={"grad_accum_dtype": "fp32"}))


@pytest.mark.parametrize("key", ["bf16_master_weights_and_grads", "bf16_optimizer_states"])
def test_an_optimizer_that_steps_no_float32_weights_is_refused(key):
    with pytest.raises(NotImplementedError, match=rf"has \['{key}'\] beside `bf16`.*Leave"):
        refuse_zero(asked(bf16=BFLOAT16 | {key: True}))


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (asked(fp16={"enabled": True}), "fp16"),
        (asked(torch_autocast={"enabled": True}), "torch_autocast"),
        (SimpleNamespace(**vars(asked()), fp16=True), "fp16"),
        (asked(0, bf16=BFLOAT16), "bf16"),
    ],
)
def test_other_half_precision_is_refused(args, key):
    with pytest.raises(NotImplementedError, match=rf"by `{key}` is not supported.*`bf16: true`"):
        refuse_zero(args)


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_other_half_precision_of_a_launch_is_refused(precision, launched):
    launched(ACCELERATE_MIXED_PRECISION=precision)
    with pytest.raises(NotImplementedError, match=rf"by `{precision}` is not supported"):
        refuse_zero(None)


@pytest.mark.parametrize(("device", "changes"), [("cpu", {"use_cpu": True}), ("meta", {})])
def test_deepspeed_is_left_aside_in_a_block(device, changes, launched):
    launched()
    args = SimpleNamespace(device=torch.device(device))
    with left_aside(args) as found:
        assert found == {"deepspeed": None} | changes
        assert not is_asked(args)
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert is_asked(args)


def test_nothing_is_left_aside_where_nobody_asks_for_it():
    with left_aside(SimpleNamespace(deepspeed=None)) as changes:
        assert changes == {}


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", "1"])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    for given in (str(file), True):
        with pytest.raises(ValueError, match=r"`deepspeed` is .* is no configuration of DeepSpeed's"):
            zero_row(SimpleNamespace(deepspeed=given))


def test_an_optimizer_in_deepspeeds_hands_has_no_empty_group():
    weight = torch.nn.Parameter(torch.ones(1))

    def made():
        groups = [{"params": [weight]}, {"params": []}]
        return SimpleNamespace(create_optimizer=lambda: torch.optim.SGD(groups, lr=0.1))

    for engaged, count in ((True, 1), (False, 2)):
        trainer = made()
        trainer.is_deepspeed_enabled = engaged
        drop_empty_groups(trainer)
        assert len(trainer.create_optimizer().param_groups) == count
