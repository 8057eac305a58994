"""What DeepSpeed refuses, and what it changes of trainers. What it trains: `distributed/test_deepspeed.py`."""

import json
import os
from types import SimpleNamespace

import cases
import ppo_cases
import pytest
import torch
from refused import refused, track

from hbat import EWCCallback
from hbat.config.ewc import EWCConfig
from hbat.engines.deepspeed.engine import DeepSpeed

ASKED = {"deepspeed": {"zero_optimization": {"stage": 2}}}
UNTESTED = {
    "untested objective": (track("grpo", engines=("ddp", "fsdp2"), **ASKED), None),
    "optimizer by DeepSpeed": (track(deepspeed=ASKED["deepspeed"] | {"optimizer": {"type": "AdamW"}}), None),
    "untested optimizer": (track(**ASKED | {"optim": "adafactor"}), None),
    "precomputed reference": (track("dpo", precompute_ref_log_probs=True, **ASKED), None),
    "compilation": (track(**ASKED | {"torch_compile": True}), None),
    "DeepSpeed for some objectives": (track("kto"), None),
    "proximal steps under DeepSpeed": (track(**ASKED), EWCConfig(method="proximal")),
    "frozen tensors under DeepSpeed": (track(**ASKED), EWCConfig(freeze=0.5)),
}


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


@pytest.mark.parametrize("name", UNTESTED)
def test_what_was_not_tested_under_deepspeed_is_refused(name):
    wrong, ewc = UNTESTED[name]
    with refused(name):
        DeepSpeed().check([track("dpo", **ASKED), wrong], ewc)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"])
def test_the_penalty_and_tested_optimizers_are_taken(optim):
    DeepSpeed().check([track(**ASKED | {"optim": optim}), track("dpo", **ASKED)], EWCConfig())


def test_a_scheduler_of_deepspeeds_own_in_the_launchers_file_is_refused(launched, monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with refused("optimizer by DeepSpeed"):
        DeepSpeed().check([track()], None)


def test_ppo_alone_is_refused(tmp_path, monkeypatch):
    args = ppo_cases.arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # with it set before, transformers would ask for DeepSpeed
    with refused("PPOTrainer under DeepSpeed"):
        ppo_cases.PPOTrainer(
            cases.tiny_llama(), args, ppo_cases.prompts(), processing_class=cases.tiny_tokenizer(),
            reward_funcs=ppo_cases.letters,
        )  # fmt: skip


def test_a_callback_that_is_not_bound_is_refused(launched):
    model = cases.tiny_llama()
    callback = EWCCallback(dict.fromkeys(dict(model.named_parameters()), 1.0))
    with refused("EWCCallback alone under DeepSpeed"):
        callback.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), None, model=model)


def test_a_proximal_callback_is_refused(launched):
    trainer = SimpleNamespace(args=SimpleNamespace(), model=cases.tiny_llama())
    with refused("proximal steps under DeepSpeed"):
        EWCCallback({}, method="proximal").bind(trainer)


def test_a_trainer_writes_no_checkpoints_and_evaluates_without_deepspeed(launched):
    args = SimpleNamespace(save_only_model=False, device=torch.device("cpu"))
    with DeepSpeed().building(args, evaluating=False) as changes:
        assert changes == {"save_strategy": "no"}
        assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    with DeepSpeed().building(args, evaluating=True) as changes:
        assert changes == {"save_strategy": "no", "deepspeed": None, "use_cpu": True}
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def trainer_on(weight, *, enabled):
    groups = [{"params": [weight]}, {"params": []}]
    return SimpleNamespace(
        is_deepspeed_enabled=enabled, accelerator=SimpleNamespace(mixed_precision="no"),
        create_optimizer=lambda: torch.optim.SGD(groups, lr=0.1),
    )  # fmt: skip


@pytest.mark.parametrize(("enabled", "count"), [(True, 1), (False, 2)])
def test_an_optimizer_that_deepspeed_steps_has_no_empty_group(enabled, count):
    trainer = trainer_on(torch.nn.Parameter(torch.ones(1)), enabled=enabled)
    DeepSpeed().adapt(trainer)
    assert len(trainer.create_optimizer().param_groups) == count


def test_a_stage_releases_the_engine_and_what_it_left_on_the_model():
    engine, model = DeepSpeed(), torch.nn.Linear(2, 2)
    row = torch.zeros(6)
    trainer = trainer_on(model.weight, enabled=True)
    trainer.deepspeed = object()
    with engine.stage([model]):
        engine.adapt(trainer)
        model.weight.data = row[:4].view(2, 2)  # as ZeRO-1 and -2 make of trained parameters
        model.weight._hp_mapping, model.weight.ds_id = None, 1  # noqa: SLF001
    assert trainer.deepspeed is None
    assert model.weight.data_ptr() != row.data_ptr()
    assert not model.weight.__dict__
