"""Moments that an objective carries from stage to stage, against a continuation by hand."""

import cases
import pytest
import runs
import torch
import trl
from torch import nn
from transformers import Adafactor, TrainerCallback

from hbat.engines.engine import Engine
from hbat.objectives.objective import Objective
from hbat.stages.moments import MomentsWarning, moments, states

ADAM = {"learning_rate": 0.01, "lr_scheduler_type": "cosine", "weight_decay": 0.1}


class Continuation:
    """Carries the moments of plain TRL trainers by hand, in the order of the parameters."""

    def __init__(self):
        self.last = {}

    def prepare(self, stage, trainer):
        """Before training: make the optimizer, and set the moments of this objective's last stage into it."""
        optimizer = trainer.create_optimizer()
        for each, state in zip(self._parameters(trainer), self.last.get(stage[2], ()), strict=False):
            optimizer.state[each] = state
        self.last[stage[2]] = _Later(lambda: [optimizer.state[each] for each in self._parameters(trainer)])

    @staticmethod
    def _parameters(trainer):
        return list(cases.trainable(trainer.model).values())


class _Later:
    """A list that is read when it is needed: the optimizer's state once training is over."""

    def __init__(self, read):
        self.read = read

    def __iter__(self):
        return iter(self.read())


@pytest.mark.parametrize(
    ("case", "optim"),
    [
        ("full", "adamw_torch"),
        ("lora", "adamw_torch_fused"),
        pytest.param("full", "adamw_torch_fused", marks=pytest.mark.slow),
        pytest.param("lora", "adamw_torch", marks=pytest.mark.slow),
    ],
)
def test_the_next_stage_of_an_objective_starts_from_its_moments(case, optim, tmp_path):
    build, sections = cases.MODEL_CASES[case], {name: ADAM | {"optim": optim} for name in ("sft", "dpo")}
    by_hand = Continuation()
    expected = runs.by_hand(build, tmp_path / "by-hand", sections=sections, prepare=by_hand.prepare)[-1]
    carried = runs.train(build(0), tmp_path / "carry", optimizer_state="carry", **sections)
    reset = runs.train(build(0), tmp_path / "reset", optimizer_state="reset", **sections)
    assert cases.largest_difference(cases.weights(carried.model), expected) < 1e-6
    assert cases.largest_difference(cases.weights(reset.model), expected) > 1e-4
    assert runs.logged(carried, "sft/learning_rate") == runs.logged(reset, "sft/learning_rate")
    steps = runs.state_tensors(tmp_path / "carry", "optimizer-sft")
    assert {float(each) for name, each in steps.items() if name.endswith("::step")} == {2.0 * runs.STEPS}


def test_moments_that_are_reset_are_not_on_disk(tmp_path):
    runs.train(cases.tiny_llama(), tmp_path, optimizer_state="reset", sft={"optim": "adamw_torch"})
    assert not list((tmp_path / "state").glob("optimizer-*"))


class WithCopy(torch.optim.SGD):
    """Keeps a copy `z` of every weight, as schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("z", parameter.detach().clone())
        return super().step(closure)


class TrainerWithCopy(trl.SFTTrainer):
    def create_optimizer(self, *args, **kwargs):
        self.optimizer = WithCopy([each for each in self.model.parameters() if each.requires_grad], lr=0.01)
        return self.optimizer


def test_an_optimizer_that_keeps_a_copy_of_the_weights_starts_anew_in_every_stage(tmp_path):
    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            found.append(dict(optimizer.state))

    found = []
    own = Objective(
        name="mine", trainer_class=TrainerWithCopy, config_class=trl.SFTConfig, config=runs.section(max_steps=1)
    )
    options = {"objectives": [own], "data": {"mine": cases.sft_rows(4)}, "optimizer_state": "carry"}
    with pytest.warns(MomentsWarning, match=r"keeps \['z'\].*it is reset between stages"):
        runs.train(cases.tiny_llama(), tmp_path, callbacks=[Look()], **options)
    assert found == [{}, {}]
    assert not list((tmp_path / "state").glob("optimizer-*"))


# --- the functions alone ---------------------------------------------------------------------------------------------


def _eight_bits(parameters):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, min_8bit_size=0)


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.9),
    "rprop": torch.optim.Rprop,
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "torch's adafactor": torch.optim.Adafactor,
    "transformers' adafactor": lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False),
    "adamw in 8 bits": _eight_bits,
}


def steps(optimizer, parameters, count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameters_of(model):
    return dict(model.named_parameters())


def read(optimizer, parameters):
    return moments(Engine().optimizer_state(optimizer, parameters))


def load(optimizer, parameters, saved):
    Engine().load_optimizer_state(optimizer, parameters, states(saved, parameters))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_continues_from_the_moments_of_another(make):
    first = nn.Linear(16, 16)
    old = make(parameters_of(first).values())
    steps(old, parameters_of(first), 3)
    second = nn.Linear(16, 16)
    second.load_state_dict(first.state_dict())
    new = make(parameters_of(second).values())
    saved = {key: moment.clone() for key, moment in read(old, parameters_of(first)).items()}
    assert {key.rsplit("::", 1)[0] for key in saved} == {"weight", "bias"}
    load(new, parameters_of(second), saved)
    steps(old, parameters_of(first), 2)
    steps(new, parameters_of(second), 2)
    assert cases.largest_difference(parameters_of(first), parameters_of(second)) == 0.0


@pytest.mark.parametrize("make", [torch.optim.ASGD, lambda parameters: WithCopy(parameters, lr=0.1)])
def test_a_state_that_holds_weights_is_not_read(make):
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    steps(optimizer, parameters_of(model), 1)
    with pytest.warns(MomentsWarning, match=r"keeps \['(ax|z)'\]"):
        assert read(optimizer, parameters_of(model)) == {}


def test_moments_find_their_parameter_by_name_in_any_order_of_groups():
    model = nn.Linear(3, 2)
    parameters = parameters_of(model)
    old = torch.optim.AdamW([model.weight, model.bias])
    steps(old, parameters, 1)
    new = torch.optim.AdamW([{"params": [model.bias], "lr": 0.5}, {"params": [model.weight]}], lr=0.25)
    load(new, parameters, read(old, parameters))
    assert torch.equal(new.state[model.weight]["exp_avg"], old.state[model.weight]["exp_avg"])
    assert torch.equal(new.state[model.bias]["exp_avg"], old.state[model.bias]["exp_avg"])
    assert [group["lr"] for group in new.param_groups] == [0.5, 0.25]


def test_a_parameter_without_moments_starts_fresh():
    model = nn.Linear(3, 2)
    old = torch.optim.AdamW(model.parameters())
    steps(old, {"weight": model.weight}, 1)
    new = torch.optim.AdamW(model.parameters())
    load(new, parameters_of(model), read(old, parameters_of(model)))
    assert model.weight in new.state
    assert model.bias not in new.state
