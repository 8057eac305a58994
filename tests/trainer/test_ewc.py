"""A run with consolidation is TRL's trainers with a penalty in their loss, and an oracle's importance."""

import cases
import oracle
import pytest
import runs
import torch

from hbat.ewc.log import EWCWarning
from hbat.objectives.objective import Objective

pytestmark = [
    pytest.mark.filterwarnings("ignore::hbat.state.consolidation.SaturationWarning"),
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
]

SLOW = {"learning_rate": 0.05, "max_steps": 3}
SECTIONS = {"sft": SLOW, "dpo": SLOW | {"beta": 0.5}}
STRENGTH = 2.0


class ByHand:
    """The penalty of plain trainers by autograd, with raw importance from the oracle."""

    def __init__(self, granularity="element", normalization="mean", scale=1.0, end_weight=1.0):
        self.granularity, self.normalization, self.scale = granularity, normalization, scale
        self.end_weight = end_weight
        self.accumulated = {}

    def trainer_class(self, stage, start):
        others = [raw for objective, raw in self.accumulated.items() if objective != stage[2]]
        if not others:
            return None
        total = {name: sum(raw[name] for raw in others) for name in start}
        importance = {
            name: torch.tensor(each, dtype=torch.float32)
            for name, each in oracle.normalize(total, self.normalization, self.scale).items()
        }
        parent = runs.trainer_of(stage[2])

        class WithPenalty(parent):
            def compute_loss(self, model, inputs, **kwargs):
                penalty = sum(
                    STRENGTH * (importance[name] * (each - start[name]) ** 2).sum()
                    for name, each in cases.trainable(self.model).items()
                )
                return super().compute_loss(model, inputs, **kwargs) + penalty

        return WithPenalty

    def after(self, stage, start, end):
        if stage == (3, 1, "dpo"):  # the last
            end = {name: start[name] + self.end_weight * (end[name] - start[name]) for name in end}
        moved = oracle.displacement(end, start, self.granularity)
        own = self.accumulated.setdefault(stage[2], dict.fromkeys(moved, 0.0))
        for name, each in moved.items():
            own[name] = own[name] + each
        return end

    def train(self, build, folder, **options):
        return runs.by_hand(
            build, folder, trainer_class=self.trainer_class, after=self.after, sections=SECTIONS, **options
        )[-1]


def assert_importance(folder, by_hand):
    for objective, accumulated in by_hand.accumulated.items():
        found = runs.state_tensors(folder, f"importance-{objective}")
        assert found.keys() == accumulated.keys()
        for name, importance in found.items():
            expected = torch.tensor(accumulated[name])
            torch.testing.assert_close(importance.double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("case", ["full", "lora", "tied"])
def test_a_run_equals_plain_trainers_with_the_penalty_in_their_loss(case, tmp_path):
    build, by_hand = cases.MODEL_CASES[case], ByHand()
    expected = by_hand.train(build, tmp_path / "by-hand")
    run = runs.train(build(0), tmp_path / "run", ewc={"strength": STRENGTH}, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    assert_importance(tmp_path / "run", by_hand)
    if case == "full":
        assert_penalty_is_logged_from_the_second_stage_on(run)
        without = runs.train(build(0), tmp_path / "without", **SECTIONS)
        assert cases.largest_difference(cases.weights(without.model), expected) > 1e-4


def assert_penalty_is_logged_from_the_second_stage_on(run):
    entries = [entry for entry in run.state.log_history if "ewc/penalty" in entry]
    assert {entry["hbat/stage"] for entry in entries} == {1, 2, 3}
    for stage in (1, 2, 3):
        first, *later = (entry for entry in entries if entry["hbat/stage"] == stage)
        assert first["ewc/grad_norm_ratio"] == 0.0
        assert all(entry["ewc/penalty"] > 0 and entry["ewc/grad_norm_ratio"] > 0 for entry in later)


def test_the_authors_preset_equals_their_softmax_in_the_loss(tmp_path):
    by_hand = ByHand(granularity="tensor", normalization="softmax", scale=1e10)
    expected = by_hand.train(cases.tiny_llama, tmp_path / "by-hand")
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc={"strength": STRENGTH, "preset": "authors"}, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6


@pytest.mark.parametrize(
    ("granularity", "end_weight"),
    [
        ("tensor", 0.5),
        pytest.param("element", 0.5, marks=pytest.mark.slow),
        pytest.param("tensor", 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_last_stage_alone_is_averaged_with_its_start_before_its_displacement_is_taken(
    granularity, end_weight, tmp_path
):
    by_hand = ByHand(granularity, end_weight=end_weight)
    expected = by_hand.train(cases.tiny_llama, tmp_path / "by-hand")
    ewc = {"strength": STRENGTH, "granularity": granularity}
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc=ewc, end_weight=end_weight, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    assert_importance(tmp_path / "run", by_hand)


def test_a_stage_of_three_objectives_is_held_by_the_sum_of_the_two_others(tmp_path):
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL has KTO elsewhere")
    data = runs.rows() | {"kto": runs.kto_rows(8)}
    expected = ByHand().train(cases.tiny_llama, tmp_path / "by-hand", data=data)
    kto = Objective(
        name="kto",
        trainer_class=trl.KTOTrainer,
        config_class=trl.KTOConfig,
        config=runs.section(),
        uses_reference=True,
    )
    run = runs.train(
        cases.tiny_llama(),
        tmp_path / "run",
        objectives=["sft", "dpo", kto],
        data=data,
        ewc={"strength": STRENGTH},
        **SECTIONS,
    )
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6


# --- what the log says -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::hbat.ewc.log.EWCWarning")
def test_a_penalty_too_weak_to_act_warns(tmp_path):
    with pytest.warns(EWCWarning, match="did nothing"):
        runs.train(cases.tiny_llama(), tmp_path, num_rounds=1, ewc={"strength": 1e-9}, **SECTIONS)
