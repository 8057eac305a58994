"""A run with consolidation is TRL's trainers with a penalty in their loss, and an oracle's importance."""

import warnings

import cases
import oracle
import pytest
import runs
import torch
import trl
from paths import Witness

from hbat.ewc.log import EWCWarning
from hbat.objectives.objective import Objective
from hbat.objectives.sft import SFT

pytestmark = [
    pytest.mark.filterwarnings("ignore::hbat.state.consolidation.SaturationWarning"),
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
]

SLOW = {"learning_rate": 0.05, "max_steps": 3}
#: The paper's importance, without the unit of a stage.
DISPLACEMENT = {"source": "displacement", "normalization": "mean"}
SECTIONS = {"sft": SLOW, "dpo": SLOW | {"beta": 0.5}}
STRENGTH = 2.0


class ByHand:
    """The penalty of plain trainers by autograd, with the oracle's importance."""

    def __init__(self, granularity="element", source="displacement", normalization="mean", scale=1.0, end_weight=1.0):
        self.granularity, self.source, self.end_weight = granularity, source, end_weight
        self.normalization, self.scale = normalization, scale
        self.left = {}

    def importance(self, others, sizes):
        if self.normalization == "stage":
            return oracle.held_by(others, self.source, damping=1.0, sizes=sizes)
        each = [oracle.normalize(record["displacement"], self.normalization, self.scale) for record in others]
        return {name: sum(one[name] for one in each) for name in sizes}

    def trainer_class(self, stage, start):
        others = [record for objective, record in self.left.items() if objective != stage[2]]
        sizes = {name: each.numel() for name, each in start.items()}
        importance = {
            name: torch.as_tensor(each).float() for name, each in self.importance(others, sizes).items() if others
        }
        self.witness = witness = Witness()

        class WithPenalty(runs.trainer_of(stage[2])):
            def compute_loss(self, model, inputs, **kwargs):
                own = cases.trainable(self.model)
                loss = super().compute_loss(model, inputs, **kwargs)
                witness.see(loss, own)
                return loss + sum(
                    STRENGTH * (each * (own[name] - start[name]) ** 2).sum() for name, each in importance.items()
                )

        return WithPenalty

    def prepare(self, stage, trainer):
        trainer.add_callback(self.witness)

    def after(self, stage, start, end):
        if stage == (3, 1, "dpo"):  # the last
            end = {name: start[name] + self.end_weight * (end[name] - start[name]) for name in end}
        record = {"displacement": oracle.displacement(end, start, self.granularity)}
        if self.source == "path":
            by_element = self.granularity == "element"
            record["importance"] = {n: each if by_element else each.mean() for n, each in self.witness.path.items()}
        own = self.left.setdefault(stage[2], {})
        for kind, tensors in record.items():
            before = own.get(kind, dict.fromkeys(tensors, 0.0))
            own[kind] = {name: before[name] + each for name, each in tensors.items()}
        return end

    def train(self, build, folder, **options):
        hooks = {"trainer_class": self.trainer_class, "prepare": self.prepare, "after": self.after}
        return runs.by_hand(build, folder, sections=SECTIONS, **hooks, **options)[-1]


def assert_left(folder, by_hand):
    """What the run has on disk of each objective is what the oracle has."""
    for objective, record in by_hand.left.items():
        for kind, tensors in record.items():
            found = runs.state_tensors(folder, f"{kind}-{objective}")
            assert found.keys() == tensors.keys()
            for name, each in found.items():
                torch.testing.assert_close(each.double(), torch.as_tensor(tensors[name]), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("case", ["full", "lora", "tied"])
def test_a_run_equals_plain_trainers_with_the_penalty_in_their_loss(case, tmp_path):
    build, by_hand = cases.MODEL_CASES[case], ByHand()
    expected = by_hand.train(build, tmp_path / "by-hand")
    run = runs.train(build(0), tmp_path / "run", ewc={"strength": STRENGTH} | DISPLACEMENT, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    assert_left(tmp_path / "run", by_hand)
    if case == "full":
        assert_penalty_is_logged_from_the_second_stage_on(run)
        without = runs.train(build(0), tmp_path / "without", **SECTIONS)
        assert cases.largest_difference(cases.weights(without.model), expected) > 1e-4


@pytest.mark.parametrize(
    ("case", "source", "granularity"),
    [
        ("full", "path", "element"),
        ("lora", "path", "tensor"),
        # What it leaves is a displacement, as above; what holds of it is in `state/test_consolidation.py`.
        pytest.param("lora", "relative", "element", marks=pytest.mark.slow),
        pytest.param("full", "path", "tensor", marks=pytest.mark.slow),
        pytest.param("lora", "path", "element", marks=pytest.mark.slow),
        pytest.param("full", "relative", "tensor", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_the_default_unit_equals_plain_trainers_with_the_penalty_in_their_loss(
    case, source, granularity, tmp_path
):
    build = cases.MODEL_CASES[case]
    by_hand = ByHand(granularity, source=source, normalization="stage")
    expected = by_hand.train(build, tmp_path / "by-hand")
    ewc = {"strength": STRENGTH, "granularity": granularity} | ({} if source == "path" else {"source": source})
    run = runs.train(build(0), tmp_path / "run", ewc=ewc, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 2e-6
    assert_left(tmp_path / "run", by_hand)
    if case == "full":
        without = runs.train(build(0), tmp_path / "without", **SECTIONS)
        assert cases.largest_difference(cases.weights(without.model), expected) > 1e-4


def assert_penalty_is_logged_from_the_second_stage_on(run):
    entries = [
        {name.partition("/")[2] if "/ewc/" in name else name: value for name, value in entry.items()}
        for entry in run.state.log_history
        if any(name.endswith("/ewc/penalty") for name in entry)
    ]
    assert {entry["hbat/stage"] for entry in entries} == {1, 2, 3}
    for stage in (1, 2, 3):
        first, *later = (entry for entry in entries if entry["hbat/stage"] == stage)
        assert first["ewc/grad_norm_ratio"] == 0.0
        assert all(entry["ewc/penalty"] > 0 and entry["ewc/grad_norm_ratio"] > 0 for entry in later)


@pytest.mark.slow  # what the preset sets is in `config/test_hbat.py`, its softmax in `ewc/test_importance.py`
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
    ewc = {"strength": STRENGTH, "granularity": granularity} | DISPLACEMENT
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc=ewc, end_weight=end_weight, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    assert_left(tmp_path / "run", by_hand)


def test_a_stage_of_three_objectives_is_held_by_each_of_the_two_others(tmp_path):
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
        ewc={"strength": STRENGTH} | DISPLACEMENT,
        **SECTIONS,
    )
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6


# --- what the log says -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::hbat.ewc.log.EWCWarning")
def test_a_penalty_too_weak_to_act_warns(tmp_path):
    with pytest.warns(EWCWarning, match="did nothing"):
        runs.train(cases.tiny_llama(), tmp_path, num_rounds=1, ewc={"strength": 1e-9}, **SECTIONS)


# --- an objective that moved nothing ---------------------------------------------------------------------------------


class Skipped(trl.SFTTrainer):
    """Its loss scale overflows at every step, so that the optimizer takes none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)


NOTHING = {
    "a learning rate of zero": ({"sft": {"learning_rate": 0.0}}, {}),
    "skipped steps": ({"objectives": [SFT(trainer_class=Skipped, config=runs.section(**SLOW)), "dpo"]}, {}),
    "relative": ({"sft": {"learning_rate": 0.0}}, {"source": "relative", "damping": 0.0, "method": "proximal"}),
}


#: Slow: `stages/test_path.py` shows that skipped steps leave nothing, `state/test_consolidation.py` the other source.
@pytest.mark.parametrize(
    ("options", "ewc"),
    [
        pytest.param(*each, id=name, marks=[] if name == "a learning rate of zero" else pytest.mark.slow)
        for name, each in NOTHING.items()
    ],
)
def test_an_objective_that_moved_nothing_holds_nothing(options, ewc, tmp_path):
    sections = {"dpo": SLOW | {"max_steps": 6}, "num_rounds": 1} | options
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", EWCWarning)
        held = runs.train(cases.tiny_llama(), tmp_path / "held", ewc=ewc, **sections)
    assert len(seen) <= 1
    free = runs.train(cases.tiny_llama(), tmp_path / "free", **sections)
    assert runs.logged(held, "ewc/penalty") == [0.0] * 6
    # A pull by nothing still rounds.
    assert cases.largest_difference(cases.weights(held.model), cases.weights(free.model)) < 1e-7
    assert all(not each.any() for each in runs.state_tensors(tmp_path / "held", "displacement-sft").values())
    assert any(bool(each.any()) for each in runs.state_tensors(tmp_path / "held", "displacement-dpo").values())
