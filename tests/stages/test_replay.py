"""Replayed rows: the gradient that they add is that of TRL's SFT loss, and the run stays exact."""

import functools
import random
from fractions import Fraction

import cases
import online_runs
import ppo_cases
import pytest
import runs
import torch
import trl
from datasets import Dataset
from kills import CutOffError, Kill, assert_equal, options
from safetensors.torch import load_file
from transformers import TrainerCallback

from hbat.config.hbat import HBATConfig
from hbat.data.load import DatasetError
from hbat.engines.engine import Engine
from hbat.stages.replay import Replay
from hbat.state.manifest import RunStateError
from hbat.state.plan import part_indices
from hbat.trainer import HBATTrainer

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

SHARE = 0.75
#: One step whose length tells its gradient.
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.01}


def replayed_rows(stage, rounds, step, batch, count, share=SHARE):
    """Numbers of the rows that a step replays."""
    index, number, _ = stage
    order = [row for each in range(number + 1) for row in part_indices(count, rounds, each, runs.SEED)]
    random.Random(runs.SEED + index).shuffle(order)
    first, last = (int(Fraction(share) * batch * each) for each in (step, step + 1))
    return [order[each % len(order)] for each in range(first, last)]


def cross_entropy(model, rows):
    """Mean over the tokens of all completions, of one row after the other."""
    tokenizer, losses = cases.tiny_tokenizer(), []
    for row in rows:
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        ids = torch.tensor(tokenizer(text)["input_ids"])
        begin = len(tokenizer(row["prompt"])["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, begin - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[begin:], reduction="none"))
    return torch.cat(losses).mean()


# --- against autograd ------------------------------------------------------------------------------------------------


class ByHand:
    """Plain trainers whose loss has the replayed term, by autograd."""

    def __init__(self, rows, rounds, batch):
        self.rows, self.rounds, self.batch, self.losses = rows, rounds, batch, []

    def trainer_class(self, stage, start):
        parent, outer = runs.trainer_of(stage[2]), self

        class WithReplay(parent):
            def compute_loss(self, model, inputs, **kwargs):
                loss = super().compute_loss(model, inputs, **kwargs)
                numbers = replayed_rows(stage, outer.rounds, self.state.global_step, outer.batch, len(outer.rows))
                if not numbers:
                    return loss
                term = cross_entropy(self.model, [outer.rows[number] for number in numbers])
                outer.losses.append(float(term.detach()))
                return loss + len(numbers) / outer.batch * term

        return parent if stage[2] == "sft" else WithReplay


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "accumulate"),
    [
        ("full", 1),
        ("lora", 2),
        pytest.param("tied", 1, marks=SLOW),
        pytest.param("full", 2, marks=SLOW),
        pytest.param("lora", 1, marks=SLOW),
    ],
)
def test_a_run_equals_plain_trainers_with_the_replayed_loss_in_theirs(case, accumulate, tmp_path):
    """Over both rounds, with clipping: steps replay one row or two, or with accumulation three."""
    build, section = cases.MODEL_CASES[case], {"gradient_accumulation_steps": accumulate, "max_steps": 3}
    sections = {"sft": section, "dpo": section}
    data = runs.rows(8)
    by_hand = ByHand(data["sft"], 2, 2 * accumulate)
    expected = runs.by_hand(
        build, tmp_path / "by-hand", data=data, sections=sections, trainer_class=by_hand.trainer_class
    )[-1]
    run = runs.train(build(0), tmp_path / "run", data=data, replay={"sft": SHARE}, **sections)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    without = runs.train(build(0), tmp_path / "without", data=data, **sections)
    assert cases.largest_difference(cases.weights(without.model), expected) > 1e-4
    logged = runs.logged(run, "replay/loss")
    assert logged == pytest.approx(by_hand.losses[::accumulate], rel=1e-5)
    assert {entry["hbat/stage"] for entry in run.state.log_history if "dpo/replay/loss" in entry} == {1, 3}


# --- against a step of TRL's SFTTrainer ------------------------------------------------------------------------------

OBJECTIVES = {
    "dpo": (cases.preference_rows(8), runs.section(), 2),
    "kto": (runs.kto_rows(8), runs.section(), 2),
    "ppo": (ppo_cases.prompts(8), runs.section(**ppo_cases.SIZES), 2),
    "grpo": (online_runs.prompts(8), online_runs.section(), 4),
    "rloo": (online_runs.prompts(8), online_runs.section(), 4),
}


def one_step(model, folder, name, *, rows, sft=None, replay=None, **options):
    """A round of SFT and another objective, whose stage takes one step of plain gradient descent."""
    data, section, _ = OBJECTIVES[name]
    config = HBATConfig(
        output_dir=str(folder),
        objectives=["sft", name],
        num_rounds=1,
        sft=runs.section(**ONE_STEP | (sft or {})),
        **{name: section | ONE_STEP | options.pop("section", {})},
        **{"ewc": None, "disable_tqdm": True, "seed": runs.SEED, "replay": replay} | options,
    )
    reward = {"ppo": ppo_cases.letters, "grpo": online_runs.variety, "rloo": online_runs.variety}.get(name)
    run = HBATTrainer(
        model,
        config,
        {"sft": rows, name: data},
        {"sft": rows} if "eval_strategy" in config.sft and config.sft["eval_strategy"] != "no" else None,
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=reward,
    )
    run.train()
    return run


def added(build, folder, name, **options):
    """What replay adds to the step, and the weights that it begins with."""
    ends = []
    for replay in (None, {"sft": SHARE}):
        run = one_step(build(0), folder / str(replay), name, replay=replay, **options)
        ends.append(cases.weights(run.model))
    start = load_file(folder / "None" / "state" / "weights-001.safetensors")
    assert start.keys() == ends[0].keys()
    return {key: ends[1][key] - ends[0][key] for key in start}, start


def step_of_sft(build, start, rows, folder, **section):
    """What a step of TRL's SFTTrainer on rows adds to weights."""
    model = runs.loaded(build, start)
    section = runs.section(**ONE_STEP | section) | {"per_device_train_batch_size": len(rows)}
    args = trl.SFTConfig(output_dir=str(folder), report_to="none", **section)
    trl.SFTTrainer(model, args, train_dataset=rows, processing_class=cases.tiny_tokenizer()).train()
    return {key: each - start[key] for key, each in cases.weights(model).items()}


def assert_added(build, folder, name, *, rows=None, section=None, **options):
    rows = cases.sft_rows(8, 3) if rows is None else rows
    batch = OBJECTIVES[name][2]
    found, start = added(build, folder, name, rows=rows, sft=section, **options)
    numbers = replayed_rows((1, 0, name), 1, 0, batch, len(rows))
    alone = (section or {}) | {"packing": False, "eval_strategy": "no"}
    whole = step_of_sft(build, start, rows.select(numbers), folder / "sft", **alone)
    expected = {key: len(numbers) / batch * each for key, each in whole.items()}
    assert cases.largest_difference(found, expected) < 3e-7  # the rounding of weights near 1
    assert max(float(each.abs().max()) for each in expected.values()) > 1e-4


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param("kto", "full", marks=[runs.needs_kto, SLOW]),
        ("ppo", "full"),
        ("ppo", "lora"),
        ("grpo", "lora"),
        pytest.param("grpo", "full", marks=SLOW),
        pytest.param("rloo", "full", marks=SLOW),
    ],
)
def test_every_objective_gets_the_gradient_of_trls_sft_loss_beside_its_own(name, case, tmp_path):
    assert_added(cases.MODEL_CASES[case], tmp_path, name)


SECTIONS = {
    "on completions": {},
    "on all tokens": {"completion_only_loss": False},
    "on answers": {"assistant_only_loss": True},
    "truncated": {"max_length": 11},
    "packed": {"packing": True, "max_length": 64},
    "evaluated inside its stages": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(each, id=name, marks=[] if name in {"on answers", "packed"} else SLOW)
        for name, each in SECTIONS.items()
    ],
)
def test_replayed_rows_are_tokenized_as_the_section_of_sft_says(section, tmp_path):
    rows = cases.sft_rows(8, 3, conversational="assistant_only_loss" in section)
    assert_added(cases.tiny_llama, tmp_path, "dpo", rows=rows, section=section)


def test_the_replayed_loss_is_computed_in_bfloat16_where_the_stage_is(tmp_path):
    rows, half = cases.sft_rows(8, 3), {"bf16": True}
    for name in ("dpo", "ppo"):  # of PPO's model the policy is a part
        folder = tmp_path / name
        found, start = added(cases.tiny_llama, folder, name, rows=rows, sft=half, section=half)
        model = runs.loaded(cases.tiny_llama, start)
        with torch.autocast("cpu", torch.bfloat16):
            (number,) = replayed_rows((1, 0, name), 1, 0, 2, 8)
            loss = cross_entropy(model, [rows[number]])
        loss.backward()
        expected = {key: -ONE_STEP["learning_rate"] / 2 * each.grad for key, each in cases.trainable(model).items()}
        assert cases.largest_difference(found, expected) < 3e-7
        full = step_of_sft(cases.tiny_llama, start, rows.select([number]), folder / "full")
        assert cases.largest_difference({key: each / 2 for key, each in full.items()}, expected) > 2e-6


# --- where it acts ---------------------------------------------------------------------------------------------------


class Sees(TrainerCallback):
    """Keeps the gradient that an action before clipping finds."""

    def __init__(self, trainer):
        self.trainer, self.found = trainer, []
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, **kwargs):
        Engine().before_clipping(self.trainer, self._note)

    def _note(self):
        self.found.append({key: each.grad.clone() for key, each in cases.trainable(self.trainer.model).items()})


def plain_dpo(folder, *, replays, **options):
    """TRL's trainer for a step, with rows replayed or not."""
    model, rows, tokenizer = cases.tiny_llama(), cases.sft_rows(8, 3), cases.tiny_tokenizer()
    section = runs.section(**ONE_STEP | options) | {"output_dir": str(folder), "report_to": "none"}
    sft = trl.SFTTrainer(cases.tiny_llama(), trl.SFTConfig(**section), train_dataset=rows, processing_class=tokenizer)
    trainer = trl.DPOTrainer(
        model,
        cases.twin(model, cases.tiny_llama).requires_grad_(False),
        trl.DPOConfig(**section),
        train_dataset=cases.preference_rows(8),
        processing_class=tokenizer,
    )
    if replays:
        Replay(sft.train_dataset, sft.data_collator, share=1.0, batch=2).bind(trainer, Engine())
    return trainer


def test_a_callback_that_is_bound_later_sees_the_gradient_of_the_task_alone(tmp_path):
    alone, both = (plain_dpo(tmp_path, replays=replays) for replays in (False, True))
    seen = [Sees(trainer) for trainer in (alone, both)]
    for trainer in (alone, both):
        trainer.train()
    assert runs.same(*(each.found[0] for each in seen))
    assert cases.largest_difference(cases.weights(alone.model), cases.weights(both.model)) > 1e-4


def test_a_gradient_scaler_does_not_change_the_result(tmp_path):
    plain, scaled = (plain_dpo(tmp_path, replays=True) for _ in range(2))
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for trainer in (plain, scaled):
        trainer.train()
    assert cases.largest_difference(cases.weights(plain.model), cases.weights(scaled.model)) < 1e-7


@pytest.mark.parametrize("case", ["full", "lora"])
def test_frozen_tensors_get_no_gradient_from_replayed_rows(case, tmp_path):
    """Neither do they move, nor do they count for the clipping norm."""
    held = {"ewc": {"strength": 0, "freeze": 0.4}, "num_rounds": 1, "replay": {"sft": 1.0}}
    seen = Frozen()
    run = runs.train(cases.MODEL_CASES[case](0), tmp_path, callbacks=[seen], **held)
    names = seen.without[1]
    assert len(names) == int(0.4 * len(cases.trainable(run.model)))
    assert seen.without[0] == set()


class Frozen(TrainerCallback):
    """Names of the trained tensors that have no gradient when a stage's optimizer steps."""

    def __init__(self):
        self.without, self.names = [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.without.append(None)
        self.names = self.names or set(cases.trainable(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        own = {name: each for name, each in model.named_parameters() if name in self.names}
        self.without[-1] = {name for name, each in own.items() if each.grad is None}


# --- exactness -------------------------------------------------------------------------------------------------------


def test_a_share_of_zero_is_no_replay_to_the_last_bit(tmp_path):
    without, zero = (runs.train(cases.tiny_llama(), tmp_path / str(each), replay=each) for each in (None, {"sft": 0}))
    assert runs.same(cases.weights(without.model), cases.weights(zero.model))
    assert runs.logged(zero, "replay/loss") == []


BUILDERS = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}


@pytest.mark.parametrize("case", [pytest.param("full", marks=SLOW), "lora"])
def test_a_run_that_was_cut_off_inside_a_stage_ends_as_if_it_was_not(case, tmp_path):
    settings = options("carry", 1) | {"replay": {"sft": SHARE}}
    whole = runs.train(BUILDERS[case](0), tmp_path / "whole", **settings)
    with pytest.raises(CutOffError):
        runs.train(BUILDERS[case](0), tmp_path / "run", callbacks=[Kill(3, "step", 2)], **settings)
    assert (tmp_path / "run" / "stage-003-dpo" / "checkpoint-1").is_dir()
    resumed = runs.train(BUILDERS[case](0), tmp_path / "run", resume=True, **settings)
    assert_equal(resumed, whole)
    assert len(runs.logged(resumed, "replay/loss")) == 6


def test_a_run_with_another_share_is_another_run(tmp_path):
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), tmp_path, callbacks=[Kill(1, "begin")], replay={"sft": 0.5})
    with pytest.raises(RunStateError, match=r"run\.replay: 0\.5 -> 0\.0"):
        runs.train(cases.tiny_llama(), tmp_path, resume=True)


def test_the_share_is_exact_over_the_steps_however_small(tmp_path):
    """A tenth of two rows a step is one row in the fifth."""
    section = {"max_steps": 10}
    run = runs.train(cases.tiny_llama(), tmp_path, num_rounds=1, dpo=section, replay={"sft": 0.1})
    assert [entry["step"] - 2 for entry in run.state.log_history if "dpo/replay/loss" in entry] == [5, 10]


@runs.drops_rows
def test_rows_that_are_too_long_to_be_replayed_are_named(tmp_path):
    long = {"prompt": "a long question " * 20, "completion": " yes"}
    data = runs.rows() | {"sft": Dataset.from_list([cases.sft_rows(1)[0], *[long] * 7])}  # replays one of them
    run = runs.build_run(
        cases.tiny_llama(), tmp_path, data=data, num_rounds=1, objectives=["dpo", "sft"], sft={"max_length": 64},
        replay={"sft": 0.25},
    )  # fmt: skip
    with pytest.raises(DatasetError, match=r"stage 0 .*`sft\.max_length` is 64, which leaves no tokens to replay"):
        run.train()
