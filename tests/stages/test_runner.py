"""What one stage does beside training: which tensors it holds, and which importance it leaves."""

import math

import cases
import oracle
import pytest
import runs
import torch
import trl
from transformers import TrainerCallback

from hbat.objectives.objective import Objective
from hbat.objectives.track import Track

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

SLOW = {"learning_rate": 0.05, "max_steps": 3}
SECTIONS = {"sft": SLOW, "dpo": SLOW}


class Boundaries(TrainerCallback):
    """Weights at the start and the end of every stage."""

    def __init__(self):
        self.starts, self.ends = [], []

    @staticmethod
    def _all(model):
        return {name: each.detach().clone() for name, each in model.named_parameters() if ".ref." not in name}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.starts.append(self._all(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.ends.append(self._all(model))


@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_most_important_tensors_are_frozen_even_for_weight_decay(case, tmp_path):
    seen = Boundaries()
    section = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.5}
    model = cases.MODEL_CASES[case](0)
    names = list(cases.trainable(model))
    ewc = {"strength": 0, "freeze": 0.4, "source": "displacement"}
    runs.train(model, tmp_path, num_rounds=1, callbacks=[seen], ewc=ewc, sft=section, dpo=section)
    moved = oracle.displacement(*({n: each[n] for n in names} for each in (seen.ends[0], seen.starts[0])), "tensor")
    held = set(sorted(names, key=lambda name: -moved[name])[: int(0.4 * len(names))])
    unchanged = {name for name in names if torch.equal(seen.starts[1][name], seen.ends[1][name])}
    assert unchanged == held
    assert all(each.requires_grad for name, each in model.named_parameters() if name in names)


def test_the_proximal_method_pulls_after_each_step_as_the_formula_says(tmp_path):
    """By hand: the step of the plain trainer, then the minimiser of the pull, with the rate of that step."""
    strength, raw = 4.0, {}

    class Pull(TrainerCallback):
        def __init__(self, importance, start):
            self.importance, self.start = importance, start

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            current = cases.trainable(model)
            rates = dict.fromkeys(current, args.learning_rate)
            pulled = oracle.proximal(current, self.start, self.importance, strength, rates)
            with torch.no_grad():
                for name, each in current.items():
                    each.copy_(torch.tensor(pulled[name]))

    def prepare(stage, trainer):
        others = [each for objective, each in raw.items() if objective != stage[2]]
        if others:
            trainer.add_callback(Pull(oracle.normalize(others[0], "max"), cases.weights(trainer.model)))

    def after(stage, start, end):
        moved = oracle.displacement(end, start, "element")
        raw[stage[2]] = {name: raw.get(stage[2], {}).get(name, 0.0) + each for name, each in moved.items()}

    expected = runs.by_hand(cases.tiny_llama, tmp_path / "by-hand", sections=SECTIONS, prepare=prepare, after=after)[
        -1
    ]
    ewc = {"strength": strength, "method": "proximal", "source": "displacement", "normalization": "max"}
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc=ewc, **SECTIONS)
    without = runs.train(cases.tiny_llama(), tmp_path / "without", **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6
    assert cases.largest_difference(cases.weights(without.model), expected) > 1e-4


@pytest.mark.slow  # `state/test_consolidation.py` has this importance, `trainer/test_ewc.py` how any acts in a run
def test_uniform_importance_pulls_every_element_alike(tmp_path):
    """With `normalization: mean` it is an L2 pull of strength / K, whatever the stages before did."""
    strength = 20.0

    def trainer_class(stage, start):
        parent = runs.trainer_of(stage[2])

        class WithPull(parent):
            def compute_loss(self, model, inputs, **kwargs):
                own = cases.trainable(self.model)
                pull = sum(((each - start[name]) ** 2).sum() for name, each in own.items()) * strength / len(own)
                return super().compute_loss(model, inputs, **kwargs) + pull

        return WithPull if stage[0] > 0 else parent

    expected = runs.by_hand(cases.tiny_llama, tmp_path / "by-hand", sections=SECTIONS, trainer_class=trainer_class)[-1]
    ewc = {"strength": strength, "source": "uniform", "normalization": "mean"}
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc=ewc, **SECTIONS)
    assert cases.largest_difference(cases.weights(run.model), expected) < 1e-6


# Slow: `trainer/test_ewc.py` has displacements of both granularities, `state/test_consolidation.py` what is drawn.
@pytest.mark.parametrize("granularity", ["element", pytest.param("tensor", marks=pytest.mark.slow)])
def test_random_importance_is_drawn_from_the_seed_and_leaves_displacement_alone(granularity, tmp_path):
    ewc = {"strength": 1.0, "source": "random", "granularity": granularity}
    run = runs.train(cases.tiny_llama(), tmp_path / "run", ewc=ewc, **SECTIONS)
    again = runs.train(cases.tiny_llama(), tmp_path / "again", ewc=ewc, **SECTIONS)
    assert runs.same(cases.weights(run.model), cases.weights(again.model))
    assert not list((tmp_path / "run" / "state").glob("importance-*"))
    shapes = {name: each.shape if granularity == "element" else () for name, each in cases.weights(run.model).items()}
    for objective in ("sft", "dpo"):
        moved = runs.state_tensors(tmp_path / "run", f"displacement-{objective}")
        assert {name: tensor.shape for name, tensor in moved.items()} == shapes


FISHER = {
    "conversations": ({}, {"conversational": True}),
    "texts": ({}, {}),
    "packed": ({"packing": True, "max_length": 64}, {}),
}


@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_empirical_fisher_of_a_stage_is_that_of_its_own_rows(case, tmp_path):
    """Its model is the one at the stage's end, its targets are completions and chosen answers."""
    seen = Boundaries()
    data = runs.rows(2)
    ewc = {"strength": 0.01, "source": "fisher", "estimator": "empirical"}
    runs.train(cases.MODEL_CASES[case](0), tmp_path, num_rounds=1, data=data, callbacks=[seen], ewc=ewc, **SECTIONS)
    answers = {"sft": "completion", "dpo": "chosen"}
    for end, (objective, answer) in zip(seen.ends, answers.items(), strict=True):
        examples = [example(row["prompt"], row[answer]) for row in data[objective]]
        expected = oracle.empirical_fisher(runs.loaded(cases.MODEL_CASES[case], end), examples)
        found = runs.state_tensors(tmp_path, f"importance-{objective}")
        assert found.keys() == expected.keys()
        for name, each in found.items():
            torch.testing.assert_close(each.double(), torch.tensor(expected[name]), rtol=1e-3, atol=1e-7)


def example(prompt, answer):
    tokenizer = cases.tiny_tokenizer()
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    after = [*after, tokenizer.eos_token_id]
    return before + after, [-100] * len(before) + after


# Slow: on texts the numbers are worked out above.
@pytest.mark.parametrize(
    ("options", "kind"),
    [pytest.param(*each, id=name, marks=pytest.mark.slow if name == "texts" else []) for name, each in FISHER.items()],
)
def test_the_fisher_of_any_format_of_rows_holds_the_next_stage(options, kind, tmp_path):
    data = {"sft": cases.sft_rows(8, 3, **kind), "dpo": cases.preference_rows(8, 3, **kind)}
    run = runs.train(
        cases.tiny_llama(),
        tmp_path,
        data=data,
        ewc={"strength": 1.0, "source": "fisher", "fisher_samples": 2},
        sft=SLOW | options,
        dpo=SLOW,
    )
    for name in ("sft", "dpo"):
        found = runs.state_tensors(tmp_path, f"importance-{name}")
        assert all(float(each.min()) >= 0 and float(each.max()) > 0 for each in found.values())
    assert max(runs.logged(run, "ewc/penalty")) > 0


# --- what an objective keeps between its stages ---------------------------------------------------------------------


class Counting(trl.SFTTrainer):
    """A trainer with a state of its own beside the model: a tensor that each stage adds one to."""

    def __init__(self, *args, seen, **kwargs):
        super().__init__(*args, **kwargs)
        self.count, self.seen = torch.zeros(2), seen

    def train(self, *args, **kwargs):
        self.seen.append(self.count.tolist())
        self.count += 1
        return super().train(*args, **kwargs)


class CountingObjective(Objective):
    def state_dict(self, trainer):
        return {"count": trainer.count}

    def load_state_dict(self, trainer, state):
        trainer.count.copy_(state["count"])


def counting(seen):
    return CountingObjective(
        name="count",
        trainer_class=Counting,
        config_class=trl.SFTConfig,
        config=runs.section(max_steps=1),
        trainer_kwargs={"seen": seen},
    )


def test_what_an_objective_keeps_goes_from_stage_to_stage_and_through_a_restart(tmp_path):
    class Stop(TrainerCallback):
        stages = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.stages += 1
            if self.stages == 4:
                raise KeyboardInterrupt

    seen, data = [], {"count": cases.sft_rows(8), "sft": cases.sft_rows(8)}
    options = {"objectives": [counting(seen), "sft"], "data": data, "num_rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        runs.train(cases.tiny_llama(), tmp_path, callbacks=[Stop()], **options)
    assert seen == [[0.0, 0.0], [1.0, 1.0]]
    seen.clear()
    runs.train(cases.tiny_llama(), tmp_path, resume=True, **options)
    assert seen == [[2.0, 2.0]]
    assert runs.state_tensors(tmp_path, "kept-count")["count"].tolist() == [3.0, 3.0]


class FromEvenSteps(Objective):
    """An objective whose stages resume from checkpoints at even steps alone."""

    def can_resume_at(self, args, rows, step):
        return step % 2 == 0


@pytest.mark.parametrize("objective_class", [Objective, FromEvenSteps])
def test_a_stage_resumes_from_a_checkpoint_where_its_objective_can(objective_class, tmp_path):
    begun = []

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and len(begun) == 1:
                raise KeyboardInterrupt

    own = objective_class(
        name="mine",
        trainer_class=trl.SFTTrainer,
        config_class=trl.SFTConfig,
        config=runs.section(save_strategy="steps", save_steps=1, save_total_limit=9, max_steps=5),
    )
    options = {"objectives": [own], "data": {"mine": cases.sft_rows(8)}, "num_rounds": 1, "callbacks": [Stop()]}
    with pytest.raises(KeyboardInterrupt):
        runs.train(cases.tiny_llama(), tmp_path, **options)
    runs.train(cases.tiny_llama(), tmp_path, resume=True, **options)
    assert begun == [0, 3 if objective_class is Objective else 2]


# --- small parts -----------------------------------------------------------------------------------------------------


def test_the_estimate_of_steps_is_that_of_transformers(tmp_path, monkeypatch):
    class Slow(Objective):
        def epoch_steps(self, args, rows):
            return rows * args.gradient_accumulation_steps

    def track(objective_class):
        own = objective_class(name="mine", trainer_class=trl.SFTTrainer, config_class=trl.SFTConfig, config=options)
        return Track(own, own.base_args(str(tmp_path)), cases.sft_rows(22))

    options = runs.section(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    expected = track(Objective).estimated_steps(2)
    assert expected == math.ceil(11 / 4) * 3
    own = track(Objective).objective
    data = {"mine": cases.sft_rows(22)}
    run = runs.train(cases.tiny_llama(), tmp_path / "run", objectives=[own], data=data)
    assert run.state.global_step == 2 * expected
    assert run.estimated_steps("mine") == expected
    assert track(Slow).estimated_steps(2) == 11 * 2 * 3
    on_two = track(Objective)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert on_two.estimated_steps(2) == math.ceil(11 / 8) * 3
