"""Slices of weights, gradients and optimizer state, on optimizers that look like DeepSpeed's; one process has all.

Two processes, and DeepSpeed itself: `distributed/test_deepspeed.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from hbat.engines.deepspeed import zero3, zero12
from hbat.engines.deepspeed.engine import DeepSpeed
from hbat.engines.sharded import part_of, whole_of

SHAPES = {"a": (2, 3), "b": (4,), "c": (1,)}


@pytest.fixture(autouse=True)
def _group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def address(start, numel):
    return SimpleNamespace(start=start, numel=numel)


def zero2(values, gradients):
    """Parameters and optimizer of ZeRO-2: `a` and `b` in one row, `c` alone in another, which begins with padding."""
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    groups = [["a", "b"], ["c"]]
    flats = [torch.cat([values[name].flatten() for name in group]) for group in groups]
    flats[1] = torch.cat([torch.zeros(2), flats[1]])
    rows = {number: [gradients[name].clone() for name in group] for number, group in enumerate(groups)}
    for number, group in enumerate(groups):
        start = 2 * number
        for index, name in enumerate(group):
            parameter, count = parameters[name], parameters[name].numel()
            parameter._index_in_param_group = index  # noqa: SLF001
            parameter._hp_mapping = SimpleNamespace(  # noqa: SLF001
                hp_fragment=flats[number][start : start + count], lp_fragment_address=address(0, count),
                hp_fragment_address=address(start, count), gradient_dict=rows, param_group_index=number,
                get_lp_grad_fragment=lambda at, group=number: rows[group][at],
            )  # fmt: skip
            start += count
    inner = torch.optim.Adam([{"params": [flat]} for flat in flats])
    own = [[parameters[name] for name in group] for group in groups]
    optimizer = SimpleNamespace(optimizer=inner, single_partition_of_fp32_groups=flats, bit16_groups=own)
    return parameters, optimizer, flats


def padded(value):
    """A share whose padding is memory as it was found."""
    return torch.cat([value.flatten(), torch.full((2,), torch.nan)])


class Zero3:
    """Parameters and optimizer of ZeRO-3, whose inner one has groups only while DeepSpeed loads a state."""

    def __init__(self, values, gradients):
        self.parameters, self.grad_position, start = {}, {}, 0
        for name, value in values.items():
            parameter = self.parameters[name] = nn.Parameter(torch.empty(0))
            parameter.ds_tensor, parameter.ds_numel, parameter.ds_shape = padded(value), value.numel(), value.shape
            parameter._z3_optimizer = self  # noqa: SLF001
            self.grad_position[id(parameter)] = [0, start, value.numel() + 2]
            start += value.numel() + 2
        flat = torch.cat([padded(value) for value in values.values()])
        self.fp32_partitioned_groups_flat, self.optimizer = [flat], torch.optim.Adam([flat])
        self.gradients = {id(self.parameters[name]): padded(gradient) for name, gradient in gradients.items()}
        self._clear_fp32_optimizer_param_groups()

    def get_param_id(self, parameter):
        return id(parameter)

    def get_local_fp32_param(self, parameter):
        _, start, count = self.grad_position[id(parameter)]
        return self.fp32_partitioned_groups_flat[0][start : start + count]

    def get_local_fp32_grad_for_param(self, parameter):
        return self.gradients[id(parameter)]

    def _set_fp32_optimizer_param_groups(self):
        self.optimizer.param_groups[0]["params"] = self.fp32_partitioned_groups_flat

    def _clear_fp32_optimizer_param_groups(self):
        self.optimizer.param_groups[0]["params"] = []


def make(stage, values, gradients):
    if stage == 2:
        return zero2(values, gradients)
    optimizer = Zero3(values, gradients)
    return optimizer.parameters, optimizer, optimizer.fp32_partitioned_groups_flat


both = pytest.mark.parametrize("stage", [2, 3])


@both
def test_slices_are_in_the_memory_that_the_optimizer_steps(stage):
    values, gradients = draw(1), draw(2)
    parameters, _, flats = make(stage, values, gradients)
    local = DeepSpeed().local(parameters)
    for name, weight in local.weights.items():
        assert torch.equal(whole_of(weight), values[name].flatten())
        part_of(weight).add_(1.0)
    assert sum(float(flat.nansum()) for flat in flats) == pytest.approx(
        sum(float((value + 1).sum()) for value in values.values()), abs=1e-5
    )


@both
def test_gradients_are_taken_and_released(stage):
    values, gradients = draw(1), draw(2)
    local = DeepSpeed().local(make(stage, values, gradients)[0])
    local.take_gradients()
    assert all(torch.equal(whole_of(local.weights[name].grad), gradients[name].flatten()) for name in SHAPES)
    local.release_gradients()
    assert all(weight.grad is None for weight in local.weights.values())


@both
def test_whole_tensors_are_cut_like_the_weights_and_numbers_stay(stage):
    local = DeepSpeed().local(make(stage, draw(1), draw(2))[0])
    anchor, scalar = draw(3), torch.tensor(2.0)
    found = local.of(anchor | {"b": scalar, "c": 3.0})
    assert torch.equal(whole_of(found["a"]), anchor["a"].flatten())
    assert (found["b"], found["c"]) == (scalar, 3.0)


@both
def test_what_was_cut_is_restored(stage):
    local = DeepSpeed().local(make(stage, draw(1), draw(2))[0])
    anchor = draw(3)
    found = local.restored(local.of(anchor))
    assert found.keys() == anchor.keys()
    assert all(torch.equal(found[name], value) for name, value in anchor.items())


def test_partitioned_tensors_are_cut_without_their_padding():
    local = DeepSpeed().local(make(3, draw(1), draw(2))[0])
    anchor = Zero3(draw(4), draw(2)).parameters
    found = local.of(anchor)
    assert all(torch.equal(whole_of(found[name]), value.flatten()) for name, value in draw(4).items())


def test_a_fragment_can_be_a_part_of_a_parameter_or_nothing():
    parameters, optimizer, _ = zero2(draw(1), draw(2))
    parameters["a"]._hp_mapping.lp_fragment_address = address(4, 2)  # noqa: SLF001
    parameters["a"]._hp_mapping.hp_fragment_address = address(1, 2)  # noqa: SLF001
    parameters["b"]._hp_mapping = None  # noqa: SLF001
    slots = {slot.name: (slot.here, slot.there) for slot in zero12.slots(optimizer, parameters)}
    assert slots["a"] == (slice(4, 6), slice(1, 3))
    assert slots["b"] == (slice(0, 0), slice(0, 0))
    anchor = draw(3)
    found = zero12.Fragments(parameters).of(anchor)
    assert torch.equal(part_of(found["a"]), anchor["a"].flatten()[4:6])
    assert part_of(found["b"]).numel() == 0


def test_gradients_in_bfloat16_become_float32_for_the_engine_too():
    values, gradients = draw(1), draw(2)
    parameters, _, _ = zero2(values, {name: gradient.bfloat16() for name, gradient in gradients.items()})
    local = DeepSpeed().local(parameters)
    rows = parameters["a"]._hp_mapping.gradient_dict  # noqa: SLF001
    rows[0][1]._zero_padding = True  # noqa: SLF001 - which DeepSpeed's norm leaves out
    local.take_gradients()
    assert [gradient.dtype for gradient in rows[0]] == [torch.float32] * 2
    assert rows[0][1]._zero_padding  # noqa: SLF001
    assert torch.equal(whole_of(local.weights["a"].grad), gradients["a"].bfloat16().float().flatten())


@both
def test_optimizer_state_comes_back_by_parameter_as_whole_tensors(stage):
    engine, saved = DeepSpeed(), {}
    for number, name in enumerate(SHAPES):
        saved[name] = {"step": torch.tensor(3.0), "exp_avg": draw(5)[name], "exp_avg_sq": draw(6 + number)[name]}
    parameters, optimizer, _ = make(stage, draw(1), draw(2))
    engine.load_optimizer_state(optimizer, parameters, saved)
    found = engine.optimizer_state(optimizer, parameters)
    for name, state in saved.items():
        assert found[name].keys() == state.keys()
        assert all(torch.equal(found[name][key], value) for key, value in state.items())
    assert len(optimizer.optimizer.param_groups[0]["params"]) == (1 if stage == 2 else 0)


@both
def test_a_parameter_without_saved_state_starts_fresh_at_the_step_of_the_others(stage):
    engine, (parameters, optimizer, _) = DeepSpeed(), make(stage, draw(1), draw(2))
    engine.load_optimizer_state(optimizer, parameters, {"a": {"step": torch.tensor(3.0), "exp_avg": draw(5)["a"]}})
    found = engine.optimizer_state(optimizer, parameters)
    assert torch.equal(found["b"]["exp_avg"], torch.zeros(4))
    assert found["b"]["step"] == 3.0


def test_a_partitioned_model_is_gathered_and_keeps_nothing_of_the_engine():
    model, values = nn.Module(), draw(1)
    for name, parameter in Zero3(values, draw(2)).parameters.items():
        parameter.partition = lambda: None
        model.register_parameter(name, parameter)
    model.__dict__["_original_parameters"] = model._parameters  # noqa: SLF001
    zero3.gather(model)
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert all(not parameter.__dict__ for parameter in model.parameters())
    assert "_original_parameters" not in model.__dict__


@pytest.mark.parametrize("kind", [zero12.Fragments, zero3.Partitions])
def test_a_parameter_that_deepspeed_does_not_hold_is_named_with_the_tested_release(kind):
    parameter = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) as release 0\.19"):
        kind({"a": parameter})
