"""The mathematics on tensors that two processes share, beside the same on whole ones.

Their first dimensions are 5 (uneven), 1 (empty on the second process), 8 and 3.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hbat.engines.sharded import first_not_finite, part_of, shared_as, whole_of
from hbat.ewc.importance import displacement, effective_tensors, most_important, normalize
from hbat.ewc.parameters import snapshot
from hbat.ewc.penalty import add_penalty_gradient_, measure_penalty, proximal_step_

SHAPES = {"uneven": (5, 3), "empty": (1, 4), "even": (8,), "third": (3, 2)}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def share(tensors, mesh):
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def parameters(values, gradients):
    made = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in values.items()}
    for name, tensor in made.items():
        tensor.grad = gradients[name].clone()
    return made


def results(values, anchor, gradients, raw):
    """Everything that is computed from four dictionaries of tensors, as lists of numbers."""
    found = {}
    own = parameters(values, gradients)
    importance = normalize(raw, "mean")
    statistics = measure_penalty(own, anchor, importance, strength=2.0, gradient_scale=4.0)
    found["statistics"] = [float(tensor) for tensor in vars(statistics).values()]
    found["largest"] = listed(normalize(raw, "max"))
    found["mean"] = listed(importance)
    for granularity in ("element", "tensor"):
        moved = displacement(values, anchor, granularity)
        found[f"displacement, {granularity}"] = listed(moved)
        found[f"effective, {granularity}"] = [effective_tensors(moved)]
        found[f"first, {granularity}"] = sorted(most_important(moved, 0.5))
    add_penalty_gradient_(own, anchor, importance, strength=3.0)
    found["gradient"] = listed({name: tensor.grad for name, tensor in own.items()})
    proximal_step_(own, anchor, importance, strength=3.0, learning_rates=dict.fromkeys(own, 0.1))
    found["proximal"] = listed(own)
    return found


def listed(tensors):
    return [number for tensor in tensors.values() for number in whole_of(tensor.detach()).flatten().tolist()]


def check():
    """What comes out with shared tensors and with whole ones, and what is true of the parts."""
    mesh = init_device_mesh("cpu", (2,))
    values, anchor, gradients = draw(1), draw(2), draw(3)
    raw = {name: tensor.square() for name, tensor in draw(4).items()}
    shared = [share(gradient, mesh) for gradient in (values, anchor, gradients, raw)]
    alike = {name: shared_as(tensor, shared[0][name]) for name, tensor in values.items()}
    faulty = snapshot(shared[3])
    if mesh.get_local_rank() == 1:
        part_of(faulty["even"])[0] = torch.nan
    try:
        normalize(faulty)
    except ValueError as error:
        refusal = str(error)
    try:
        normalize(raw | {"even": shared[3]["even"]})
    except ValueError as error:
        mixed = str(error)
    return {
        "shared": results(*shared),
        "whole": results(values, anchor, gradients, raw),
        "cut as torch does": all(
            torch.equal(tensor.to_local(), shared[0][name].to_local()) for name, tensor in alike.items()
        ),
        "rows here": {name: len(part_of(tensor)) for name, tensor in shared[0].items()},
        "not finite": first_not_finite(faulty),
        "refusal": refusal,
        "mixed": mixed,
    }
