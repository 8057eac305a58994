"""Moments that an objective carries from stage to stage, against a continuation by hand."""

import cases
import pytest
import runs
import torch
from torch import nn

from hbat.stages.moments import load_moments, moments

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


@pytest.mark.parametrize("case", ["full", "lora"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_next_stage_of_an_objective_goes_on_in_its_moments(case, optim, tmp_path):
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


def test_moments_in_eight_bits_are_carried(tmp_path):
    pytest.importorskip("bitsandbytes")
    sections = {name: ADAM | {"optim": "adamw_8bit"} for name in ("sft", "dpo")}
    try:
        reset = runs.train(cases.tiny_llama(), tmp_path / "reset", optimizer_state="reset", **sections)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit Adam on this machine: {error}")
    carried = runs.train(cases.tiny_llama(), tmp_path / "carry", optimizer_state="carry", **sections)
    assert not runs.same(cases.weights(carried.model), cases.weights(reset.model))
    kinds = {each.dtype for each in runs.state_tensors(tmp_path / "carry", "optimizer-sft").values()}
    assert torch.isfinite(torch.cat([each.flatten() for each in cases.weights(carried.model).values()])).all()
    assert kinds


# --- the two functions alone -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rprop": torch.optim.Rprop,
}


def steps(optimizer, parameters, count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        for each in parameters.values():
            each.grad = torch.randn(each.shape, generator=generator)
        optimizer.step()


def parameters_of(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_were_the_old_one(make):
    first = nn.Linear(3, 2)
    old = make(parameters_of(first).values())
    steps(old, parameters_of(first), 3)
    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    new = make(parameters_of(second).values())
    saved = {key: each.clone() for key, each in moments(old, parameters_of(first)).items()}
    load_moments(new, parameters_of(second), saved)
    steps(old, parameters_of(first), 2)
    steps(new, parameters_of(second), 2)
    assert cases.largest_difference(parameters_of(first), parameters_of(second)) == 0.0


def test_moments_find_their_parameter_by_name_in_any_order_of_groups():
    model = nn.Linear(3, 2)
    parameters = parameters_of(model)
    old = torch.optim.AdamW([model.weight, model.bias])
    steps(old, parameters, 1)
    new = torch.optim.AdamW([{"params": [model.bias], "lr": 0.5}, {"params": [model.weight]}], lr=0.25)
    load_moments(new, parameters, moments(old, parameters))
    assert torch.equal(new.state[model.weight]["exp_avg"], old.state[model.weight]["exp_avg"])
    assert torch.equal(new.state[model.bias]["exp_avg"], old.state[model.bias]["exp_avg"])
    assert [group["lr"] for group in new.param_groups] == [0.5, 0.25]


def test_a_parameter_without_moments_starts_fresh():
    model = nn.Linear(3, 2)
    old = torch.optim.AdamW(model.parameters())
    steps(old, {"weight": model.weight}, 1)
    new = torch.optim.AdamW(model.parameters())
    load_moments(new, parameters_of(model), moments(old, parameters_of(model)))
    assert model.weight in new.state
    assert model.bias not in new.state
