"""DTensor helpers: this rank's part of a tensor, the whole of it, and reductions over its parts.

A plain tensor is its own part and its own whole, without communication. With DTensors, what reads the whole or reduces
is a collective: call on every rank.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

_TensorOrNumber = TypeVar("_TensorOrNumber", Tensor, Tensor | float)


def is_shared(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def whole_shape(tensor: object) -> tuple[int, ...]:
    """Shape of the whole tensor, also of a parameter that ZeRO-3 has partitioned; `()` of a number."""
    return tuple(getattr(tensor, "ds_shape", getattr(tensor, "shape", ())))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any module of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def give_back(model: nn.Module) -> None:
    """Reshard what FSDP2 left unsharded after a forward without backward; not to be called between the two."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def part_of(tensor: Tensor) -> Tensor:
    """This rank's part in the same memory, without gradient and possibly empty."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def parts_of(tensors: Mapping[str, _TensorOrNumber]) -> Mapping[str, _TensorOrNumber]:
    """This rank's parts, in the same memory: for operations in place."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return tensors
    return {name: part_of(tensor) if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def as_part(part: Tensor, like: Tensor) -> Tensor:
    """DTensor of the parts that each rank gives, placed as `like`; the part itself where `like` is whole."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def shared_as(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank holds whole as `like` is, if it has its shape. Without communication."""
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
    """Gather a tensor on every rank. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Ranks communicate through their accelerator's memory.
    return cast("DTensor", tensor.detach().to(tensor.device_mesh.device_type)).full_tensor()


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors one by one onto the CPU of the ranks that `keep` them; the others return none. Collective."""
    result = {}
    for name, tensor in tensors.items():
        whole = whole_of(tensor)
        if keep:
            result[name] = whole.cpu() if is_shared(tensor) else whole
    return result


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """`model.state_dict()` of whole tensors, tied ones shared, on the ranks that `keep` it. Collective."""
    give_back(model)
    names: dict[int, str] = {}
    first = {
        name: names.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    state = model.state_dict()
    whole = whole_tensors({name: tensor for name, tensor in state.items() if first.get(name, name) == name}, keep=keep)
    return {name: whole[first.get(name, name)] for name in state} if keep else {}


def summed(values: Tensor, over: Iterable[Tensor]) -> Tensor:
    """Sum this rank's numbers about `over`, all sharded alike or all whole, over the ranks. One collective.

    Args:
        values: This rank's numbers.
        over: The tensors that they are about.

    Returns:
        Sums, the same on every rank; `values` themselves where the tensors are whole.

    Raises:
        ValueError: If some of the tensors are whole and others are not.
    """
    return _reduced(values, over, torch.distributed.ReduceOp.SUM)


def smallest(values: Tensor, over: Iterable[Tensor]) -> Tensor:
    """As `summed`, but the minimum, in which NaN counts as minus infinity."""
    return _reduced(values, over, torch.distributed.ReduceOp.MIN)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN or infinity, the same on every rank. One collective."""
    if not tensors:
        return None
    finite = [torch.isfinite(part_of(tensor)).all() for tensor in tensors.values()]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).float()
    faulty = (smallest(flags, tensors.values()) == 0).nonzero()
    return list(tensors)[int(faulty[0])] if len(faulty) else None


def _reduced(values: Tensor, over: Iterable[Tensor], operation: Any) -> Tensor:
    tensors = list(over)
    shared = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not shared:
        return values
    if len(shared) < len(tensors):
        raise ValueError(
            f"{len(shared)} of {len(tensors)} tensors are sharded and the others are whole, so their sums cannot be "
            "taken together. Shard all trained parameters or none."
        )
    if operation == torch.distributed.ReduceOp.MIN:  # what a minimum of NaN is depends on the backend
        values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    mesh = shared[0].device_mesh
    result = values.to(mesh.device_type, copy=True)
    for dimension, placement in enumerate(shared[0].placements):
        if placement.is_shard():
            torch.distributed.all_reduce(result, op=operation, group=mesh.get_group(dimension))
    return result.to(values.device)
