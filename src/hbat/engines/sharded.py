"""Tensors that processes share (DTensor): the part on this process, and what all parts come to. Owns no formula.

A plain tensor is whole on every process: it is its own part, and nothing is communicated for it. With shared tensors
everything here that speaks of all parts is a collective: every process has to come by.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

_TensorOrNumber = TypeVar("_TensorOrNumber", Tensor, Tensor | float)


def is_shared(tensor: object) -> bool:
    """Whether a tensor lies on several processes, a part on each.

    Args:
        tensor: A tensor.

    Returns:
        True for a DTensor.
    """
    return isinstance(tensor, DTensor)


def whole_shape(tensor: object) -> tuple[int, ...]:
    """Give the shape of a tensor as a whole, wherever it lies.

    Args:
        tensor: A tensor or a number.

    Returns:
        Its shape, which DeepSpeed's ZeRO-3 keeps beside an empty one; `()` of a number.
    """
    return tuple(getattr(tensor, "ds_shape", getattr(tensor, "shape", ())))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shares a model's parameters between processes.

    Args:
        model: The model.

    Returns:
        True if it does so with any part of the model.
    """
    return any(isinstance(each, FSDPModule) for each in model.modules())


def give_back(model: nn.Module) -> None:
    """Let go of parameters that FSDP2 put together for a forward pass and kept, as it does without a backward pass.

    Until then the model shows these copies as its parameters, and computes with them whatever becomes of the parts.

    Args:
        model: The model, not between forward and backward pass; one that is not sharded stays as it is.
    """
    for each in model.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@torch.no_grad()
def part_of(tensor: Tensor) -> Tensor:
    """Give the part of a tensor that lies on this process.

    Args:
        tensor: A tensor.

    Returns:
        The part, in the same memory, without gradient and possibly empty; the tensor itself where it is whole.
    """
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def parts_of(tensors: Mapping[str, _TensorOrNumber]) -> Mapping[str, _TensorOrNumber]:
    """Give the parts on this process of several tensors, with the parts of their gradients.

    Args:
        tensors: Tensors by name; numbers stay numbers.

    Returns:
        The parts by name, in the same memory: what is done to them and their gradients in place is done to the
        tensors. `tensors` itself where all are whole.
    """
    if not any(isinstance(each, DTensor) for each in tensors.values()):
        return tensors
    return {name: _with_gradient(each) if isinstance(each, DTensor) else each for name, each in tensors.items()}


def _with_gradient(tensor: DTensor) -> Tensor:
    part = part_of(tensor)
    if tensor.grad is not None:
        part.grad = part_of(tensor.grad)
    return part


@torch.no_grad()
def as_part(part: Tensor, like: Tensor) -> Tensor:
    """Make a tensor of the parts that processes worked out, each its own.

    Args:
        part: This process's part.
        like: A tensor of the whole's shape.

    Returns:
        The whole, shared as `like` is; the part itself where `like` is whole.
    """
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def shared_as(whole: Tensor, like: Tensor) -> Tensor:
    """Share a tensor that every process has as a whole, without communication.

    Args:
        whole: The tensor.
        like: Shared or not.

    Returns:
        The tensor, shared as `like` is if it has its shape; `whole` itself otherwise, or where `like` is whole.
    """
    if not isinstance(like, DTensor) or isinstance(whole, DTensor) or whole.shape != like.shape:
        return whole
    part = whole
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            pieces = part.chunk(like.device_mesh.size(dimension), placement.dim)
            own = like.device_mesh.get_local_rank(dimension)
            part = pieces[own] if own < len(pieces) else part.narrow(placement.dim, 0, 0)
    return as_part(part.clone(), like)


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """Put a tensor's parts together, on every process.

    Args:
        tensor: A tensor.

    Returns:
        The whole tensor; the tensor itself where it is whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # Processes talk through their accelerator's memory.
    return cast("DTensor", tensor.detach().to(tensor.device_mesh.device_type)).full_tensor()


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Put tensors together one after the other, on the CPU of those processes that keep them.

    Args:
        tensors: Tensors by name, the same on every process.
        keep: Whether this process keeps the whole tensors.

    Returns:
        Whole tensors by name, those that were shared on the CPU; none where they are not kept.
    """
    result = {}
    for name, each in tensors.items():
        whole = whole_of(each)
        if keep:
            result[name] = whole.cpu() if is_shared(each) else whole
    return result


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Put a model's state together; tied tensors stay one.

    Args:
        model: The model.
        keep: Whether this process keeps it.

    Returns:
        What `model.state_dict()` gives of a model that is not shared.
    """
    give_back(model)
    names: dict[int, str] = {}
    first = {name: names.setdefault(id(each), name) for name, each in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    whole = whole_tensors({name: each for name, each in state.items() if first.get(name, name) == name}, keep=keep)
    return {name: whole[first.get(name, name)] for name in state} if keep else {}


def summed(values: Tensor, over: Iterable[Tensor]) -> Tensor:
    """Add up numbers about parts, over the processes that hold the parts: one collective.

    Args:
        values: This process's numbers.
        over: The tensors that they are about; all shared in one way, or all whole.

    Returns:
        Sums, the same on every process; `values` themselves where the tensors are whole.
    """
    return _reduced(values, over, torch.distributed.ReduceOp.SUM)


def smallest(values: Tensor, over: Iterable[Tensor]) -> Tensor:
    """Take the smallest of numbers about parts, over the processes that hold the parts: one collective.

    Args:
        values: This process's numbers.
        over: The tensors that they are about; all shared in one way, or all whole.

    Returns:
        The smallest ones; where the tensors are shared, NaN counts as minus infinity.
    """
    return _reduced(values, over, torch.distributed.ReduceOp.MIN)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Find a tensor with NaN or infinity, wherever it lies: one collective.

    Args:
        tensors: Tensors by name.

    Returns:
        Name of the first, the same on every process; None where all are finite.
    """
    if not tensors:
        return None
    finite = [torch.isfinite(part_of(each)).all() for each in tensors.values()]
    flags = torch.stack([each.to(finite[0].device) for each in finite]).float()
    faulty = (smallest(flags, tensors.values()) == 0).nonzero()
    return list(tensors)[int(faulty[0])] if len(faulty) else None


def _reduced(values: Tensor, over: Iterable[Tensor], operation: Any) -> Tensor:
    tensors = list(over)
    shared = [each for each in tensors if isinstance(each, DTensor)]
    if not shared:
        return values
    if len(shared) < len(tensors):
        raise ValueError(
            f"{len(shared)} of {len(tensors)} tensors are shared between processes and the others are not, so their "
            "sums cannot be taken together. Shard all trained parameters, or none."
        )
    if operation == torch.distributed.ReduceOp.MIN:  # what comes of NaN is the backend's choice
        values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    mesh = shared[0].device_mesh
    result = values.to(mesh.device_type, copy=True)
    for dimension, placement in enumerate(shared[0].placements):
        if placement.is_shard():
            torch.distributed.all_reduce(result, op=operation, group=mesh.get_group(dimension))
    return result.to(values.device)
