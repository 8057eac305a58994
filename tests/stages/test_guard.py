"""A run leaves no trace on its model, and a stage none for the next."""

import contextlib
import copy
import functools
import gc
import os
import types

import cases
import pytest
import runs
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from hbat.engines.environment import kept_environment
from hbat.model.copies import unpatched_copy
from hbat.stages.guard import StageGuard

CASES = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

each_case = pytest.mark.parametrize("case", ["full", "lora"])


def traces(model):
    """Everything of a model but its weights that a trainer may leave changed."""
    return {
        "attributes": {
            name: sorted(key for key in module.__dict__ if key not in {"_modules", "_parameters", "_buffers"})
            for name, module in model.named_modules()
        },
        "hooks": {
            (name, kind): len(getattr(module, kind)) for name, module in model.named_modules() for kind in HOOKS
        },
        "dropout": {name: each.p for name, each in model.named_modules() if isinstance(each, nn.Dropout)},
        "checkpointing": {
            name: each.gradient_checkpointing
            for name, each in model.named_modules()
            if hasattr(each, "gradient_checkpointing")
        },
        "mode": {name: each.training for name, each in model.named_modules()},
        "requires_grad": {name: each.requires_grad for name, each in model.named_parameters()},
        "gradients": [name for name, each in model.named_parameters() if each.grad is not None],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "use_cache": model.config.use_cache,
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "tags": getattr(model, "model_tags", None),
        "environment": dict(os.environ),
    }


class LiveTensors(TrainerCallback):
    """Counts the live tensors at the start of every stage."""

    def __init__(self):
        self.counts = []

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()
        self.counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))


@pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_twenty_stages_leave_the_model_as_it_was_and_hold_nothing(case, tmp_path):
    model, live = CASES[case](0), LiveTensors()
    run = runs.build_run(
        model,
        tmp_path,
        num_rounds=10,
        data=runs.rows(10),
        sft={"max_steps": 1},
        dpo={"max_steps": 1},
        callbacks=[live],
    )
    before = traces(CASES[case](0))
    for found in (traces(model), run.train() and traces(model)):  # after construction, and after training
        assert found == before
    assert len(live.counts) == 20
    assert live.counts[19] == live.counts[5]
    assert live.counts[18] == live.counts[4]


@each_case
def test_a_failing_stage_leaves_the_model_as_it_was(case, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("a callback of the user fails")

    model = CASES[case](0)
    before = traces(model)
    with pytest.raises(RuntimeError, match="of the user fails"):
        runs.train(model, tmp_path, callbacks=[Fails()], sft={runs.CHECKPOINTING: True})
    assert traces(model) == before


class Checkpointing(TrainerCallback):
    """At the first step of every stage: is gradient checkpointing on, and how many hooks has the model?"""

    def __init__(self):
        self.on, self.hooks = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.on.append(any(getattr(each, "gradient_checkpointing", False) for each in model.modules()))
            self.hooks.append(sum(len(getattr(each, kind)) for each in model.modules() for kind in HOOKS))


@each_case
def test_gradient_checkpointing_of_one_objective_does_not_reach_the_other(case, tmp_path):
    seen = Checkpointing()
    runs.train(CASES[case](0), tmp_path, callbacks=[seen], sft={runs.CHECKPOINTING: True})
    assert seen.on == [True, False, True, False]
    assert seen.hooks[1] == seen.hooks[3] == 0


@pytest.mark.filterwarnings("always::FutureWarning")
def test_what_the_libraries_deprecate_of_each_other_stays_out_of_a_run(tmp_path, recwarn):
    on = {runs.CHECKPOINTING: True, "max_steps": 1}
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    runs.train(cases.tiny_llama(), tmp_path, sft=on, dpo=on, num_rounds=1, peft_config=adapter)
    assert [str(each.message) for each in recwarn if each.category is FutureWarning] == []


def test_hooks_of_gradient_checkpointing_do_not_add_up_over_stages(tmp_path):
    seen = Checkpointing()
    on = {runs.CHECKPOINTING: True}
    runs.train(CASES["lora"](0), tmp_path, num_rounds=4, callbacks=[seen], sft=on, dpo=on)
    assert seen.on == [True] * 8
    assert len(set(seen.hooks[0::2])) == 1
    assert len(set(seen.hooks[1::2])) == 1


def test_checkpointed_stages_train_the_same_weights(tmp_path):
    on = {runs.CHECKPOINTING: True}
    plain = runs.train(CASES["lora"](0), tmp_path / "plain", num_rounds=1)
    checkpointed = runs.train(CASES["lora"](0), tmp_path / "checkpointed", num_rounds=1, sft=on, dpo=on)
    assert cases.largest_difference(cases.weights(plain.model), cases.weights(checkpointed.model)) < 1e-6


# --- the guard alone -------------------------------------------------------------------------------------------------


def test_the_guard_keeps_what_was_there_before():
    model = cases.tiny_llama()
    own, hook = model.forward, model.model.embed_tokens.register_forward_hook(lambda *_: None)
    model.forward = own
    guard = StageGuard(model)
    model.forward = lambda *_: None
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    guard.restore()
    assert model.__dict__["forward"] == own
    assert list(model.model.embed_tokens._forward_hooks) == [hook.id]  # noqa: SLF001 - torch's only place for it


def test_methods_and_the_routers_options_that_a_trainer_sets_do_not_stay():
    model = cases.tiny_llama()
    model.config.output_router_logits = False
    guard = StageGuard(model)
    model.gradient_checkpointing_enable = lambda **_: None  # as TRL does for `selective`
    model.config.output_router_logits = True  # as TRL does for a mixture of experts
    guard.restore()
    assert "gradient_checkpointing_enable" not in vars(model)
    assert model.config.output_router_logits is False


@pytest.mark.parametrize("before", [False, True], ids=["first in the stage", "before it as well"])
def test_hidden_states_can_still_be_asked_for_after_a_stage_that_did(before):
    """transformers 5 collects them with hooks, and a mark on the model that the hooks are there."""
    model = cases.tiny_llama()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "output_hidden_states": True}
    if before:
        model(**inputs)
    guard = StageGuard(model)
    model(**inputs)
    guard.restore()
    layers = model.config.num_hidden_layers
    assert len(model(**inputs).hidden_states) == layers + 1
    assert len(unpatched_copy(model)(**inputs).hidden_states) == layers + 1


def test_a_trainer_that_fails_leaves_the_precision_in_the_environment(monkeypatch):
    for before in (None, "fp16"):
        if before is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", before)
        with contextlib.suppress(KeyError), kept_environment():
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
            raise KeyError
        assert os.environ.get("ACCELERATE_MIXED_PRECISION") == before


def test_a_copy_computes_with_its_own_weights():
    model = cases.tiny_llama().train()
    plain = model.forward
    model.forward = types.MethodType(lambda _, *args, **kwargs: plain(*args, **kwargs), model)
    copied = unpatched_copy(model)
    with torch.no_grad():
        for each in copied.parameters():
            each.zero_()
        assert torch.equal(copied(torch.tensor([[5, 6]])).logits, torch.zeros(1, 2, cases.VOCABULARY_SIZE))
    assert "forward" in model.__dict__
    assert not any(each.requires_grad for each in copied.parameters())
    assert not copied.training
