"""What is asked of DeepSpeed, as arguments or `accelerate launch` say it, and what no trainer can use of it."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from support_table import ENGINES

from hbat.engines.deepspeed.request import is_asked, left_aside, refuse_zero, zero_row

LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` says of ZeRO-2."""

    def say(**more):
        for key, value in (LAUNCHED | more).items():
            monkeypatch.setenv(key, value)

    return say


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
    with pytest.raises(NotImplementedError, match=rf"has \['{key}'\] beside `bf16`.*Remove"):
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


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", "1"])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    for given in (str(file), True):
        with pytest.raises(ValueError, match=r"`deepspeed` is .* cannot be read as a DeepSpeed configuration"):
            zero_row(SimpleNamespace(deepspeed=given))
