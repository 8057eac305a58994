"""A run without consolidation is nothing but TRL's trainers one after the other."""

import functools
import math

import cases
import pytest
import runs
import torch
from transformers import TrainerCallback

BUILDERS = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
SECTIONS = {"sft": ADAM | {"seed": 7}, "dpo": ADAM | {"seed": 9, "beta": 0.3, "gradient_accumulation_steps": 2}}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Weights at the end of plain TRL trainers, trained once for a case and a number of rounds."""

    @functools.cache
    def train(case, num_rounds):
        folder = tmp_path_factory.mktemp("by-hand")
        return runs.by_hand(BUILDERS[case], folder, num_rounds=num_rounds, sections=SECTIONS)[-1]

    return train


@pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_one_round_is_two_stage_training(case, by_hand, tmp_path):
    run = runs.train(BUILDERS[case](0), tmp_path, num_rounds=1, **SECTIONS)
    assert runs.same(cases.weights(run.model), by_hand(case, 1))


@pytest.mark.parametrize(
    ("case", "ewc"),
    [
        pytest.param("full", None, id="none-full"),
        pytest.param("lora", {"strength": 0}, id="zero strength-lora"),
        pytest.param("full", {"strength": 0}, id="zero strength-full", marks=pytest.mark.slow),
        pytest.param("lora", None, id="none-lora", marks=pytest.mark.slow),
    ],
)
def test_a_run_without_a_penalty_equals_plain_trainers(case, ewc, by_hand, tmp_path):
    run = runs.train(BUILDERS[case](0), tmp_path, ewc=ewc, **SECTIONS)
    assert runs.same(cases.weights(run.model), by_hand(case, 2))
    assert case == "lora" or not runs.same(by_hand(case, 1), by_hand(case, 2))


def test_gradients_that_stages_accumulate_count_as_in_plain_trainers(tmp_path):
    sections = {"sft": {"gradient_accumulation_steps": 2}, "dpo": {"max_grad_norm": 0.1}}
    expected = runs.by_hand(cases.tiny_llama, tmp_path / "by-hand", sections=sections)[-1]
    run = runs.train(cases.tiny_llama(), tmp_path / "run", **sections)
    assert runs.same(cases.weights(run.model), expected)


# --- the reference policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "accumulation"),
    [
        ("full", 2),
        # The next test has the first rewards of an adapter's stages too.
        pytest.param("lora", 1, marks=pytest.mark.slow),
        pytest.param("full", 1, marks=pytest.mark.slow),
        pytest.param("lora", 2, marks=pytest.mark.slow),
    ],
)
def test_every_preference_stage_starts_at_its_reference(case, accumulation, tmp_path):
    run = runs.train(BUILDERS[case](0), tmp_path, dpo={"gradient_accumulation_steps": accumulation})
    rewards = [each for each in run.state.log_history if "dpo/rewards/chosen" in each]
    by_stage = {stage: [each for each in rewards if each["hbat/stage"] == stage] for stage in (1, 3)}
    for entries in by_stage.values():
        first, second = entries
        assert first["dpo/rewards/chosen"] == 0.0
        assert first["dpo/rewards/rejected"] == 0.0
        assert second["dpo/rewards/chosen"] != 0.0


@pytest.mark.parametrize("case", ["full", "lora"])
def test_attention_dropout_is_off_in_preference_stages_and_back_in_the_next(case, tmp_path):
    """TRL switches off layers of dropout, and attention keeps its probability as a number."""

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            attention = [module for module in model.modules() if hasattr(module, "attention_dropout")]
            seen.append({module.attention_dropout for module in attention})

    seen, model = [], BUILDERS[case](0)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.25
    run = runs.train(model, tmp_path, callbacks=[Look()])
    assert seen == [{0.25}, {0.25}, {0.0}, {0.0}] * 2
    for side in ("chosen", "rejected"):
        assert runs.logged(run, f"dpo/rewards/{side}")[:: runs.STEPS] == [0.0, 0.0]
    assert runs.logged(run, "dpo/loss")[:: runs.STEPS] == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_the_reference_of_a_model_that_a_trainer_touched_does_not_follow_the_policy(tmp_path):
    touched = _touched(tmp_path / "before")
    fresh = runs.loaded(cases.tiny_llama, cases.weights(touched))
    runs.train(touched, tmp_path / "touched")
    runs.train(fresh, tmp_path / "fresh")
    assert runs.same(cases.weights(touched), cases.weights(fresh))


def _touched(folder, **options):
    import trl

    model = cases.tiny_llama()
    args = trl.SFTConfig(**cases.CHEAP_ARGS | {"output_dir": str(folder), "max_steps": 1} | options)
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=cases.sft_rows(2), processing_class=cases.tiny_tokenizer()
    )
    trainer.train()
    return model


# --- arithmetic ------------------------------------------------------------------------------------------------------


class StageCounter(TrainerCallback):
    """Knows which stage trains."""

    def __init__(self):
        self.stage = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage += 1


@pytest.fixture
def dtypes_by_stage(monkeypatch):
    """A callback, and the set of types that linear layers return in each stage."""
    counter, found, plain = StageCounter(), {}, torch.nn.functional.linear

    def linear(*args, **kwargs):
        result = plain(*args, **kwargs)
        found.setdefault(counter.stage, set()).add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return counter, found


MIXED = {"sft": {"bf16": True}, "dpo": {"bf16": True}}


@pytest.mark.parametrize("case", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_every_stage_computes_in_bfloat16_when_asked(case, dtypes_by_stage, tmp_path):
    counter, found = dtypes_by_stage
    runs.train(BUILDERS[case](0), tmp_path, callbacks=[counter], **MIXED)
    assert {stage: found[stage] for stage in range(4)} == {stage: {torch.bfloat16} for stage in range(4)}


def test_a_model_that_a_trainer_touched_still_computes_in_bfloat16(dtypes_by_stage, tmp_path):
    counter, found = dtypes_by_stage
    touched = _touched(tmp_path / "before", bf16=True)
    runs.train(touched, tmp_path / "run", callbacks=[counter], **MIXED)
    assert {stage: found[stage] for stage in range(4)} == {stage: {torch.bfloat16} for stage in range(4)}


def test_a_stage_in_bfloat16_does_not_drag_the_next_one_along(dtypes_by_stage, tmp_path):
    counter, found = dtypes_by_stage
    runs.train(cases.tiny_llama(), tmp_path, callbacks=[counter], sft={"bf16": True})
    assert [found[stage] for stage in range(4)] == [{torch.bfloat16}, {torch.float32}] * 2
