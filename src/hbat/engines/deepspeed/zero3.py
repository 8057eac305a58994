"""ZeRO-3: no rank holds a whole parameter, except while it computes with it.

`parameter.data` is empty, and `parameter.ds_tensor` is this rank's share of the flattened elements. All shares of a
parameter have one length, so the last ones end in padding, which is uninitialised memory: nothing here reads it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hbat.engines.deepspeed.flat import FlatLocal, Slot, forget, untested_release

#: What DeepSpeed leaves on parameters and modules, beside what begins with `ds_`.
_ON_PARAMETERS = {
    "all_gather", "all_gather_coalesced", "partition", "reduce_gradients_at_owner", "partition_gradients",
    "aligned_size", "padding_size", "partition_numel", "item", "convert_to_zero_parameters", "is_external_param",
    "nvme_swapper", "_z3_optimizer",
}  # fmt: skip
_ON_MODULES = {"all_parameters", "_external_params", "_original_parameters", "pre_bwd_fn", "post_bwd_fn"}


def is_partitioned(tensor: object) -> bool:
    """Whether a parameter is partitioned by ZeRO-3."""
    return isinstance(getattr(tensor, "ds_tensor", None), Tensor)


def is_zero3(optimizer: Any) -> bool:
    """Whether an optimizer is that of ZeRO-3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


class Partitions(FlatLocal):
    """This rank's shares of weights and gradients, without padding."""

    def _weight(self, parameter: Any) -> Tensor:
        return _own(_optimizer_of(parameter).get_local_fp32_param(parameter), parameter)

    def _gradient(self, parameter: Any) -> Tensor:
        return _own(_optimizer_of(parameter).get_local_fp32_grad_for_param(parameter), parameter)

    def _cut(self, tensor: Any, parameter: Any) -> Tensor:
        return _own(tensor.ds_tensor, parameter) if is_partitioned(tensor) else tensor.reshape(-1)[_here(parameter)]


def _own(share: Tensor, parameter: Any) -> Tensor:
    here = _here(parameter)
    return share[: here.stop - here.start]


def _here(parameter: Any) -> slice:
    # This rank's share, without padding, among the parameter's flattened elements.
    length, total = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(length * torch.distributed.get_rank(), total)
    return slice(start, min(start + length, total))


def _optimizer_of(parameter: Any) -> Any:
    try:
        return parameter._z3_optimizer  # noqa: SLF001 - DeepSpeed's public functions read it too
    except AttributeError:
        raise untested_release(getattr(parameter, "ds_shape", parameter.shape)) from None


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Make a model whole on every rank, once no engine computes with it. Collective for each partitioned parameter."""
    partitioned: list[Any] = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    for parameter in partitioned:
        parameter.data = _whole(parameter)
        parameter.grad = None
        forget(parameter, _ON_PARAMETERS)
    for module in model.modules():
        if "_original_parameters" in module.__dict__:
            module._parameters = dict(module._parameters.items())  # noqa: SLF001 - DeepSpeed put its own dict there
            forget(module, _ON_MODULES)


def _whole(parameter: Any) -> Tensor:
    own = parameter.ds_tensor.detach().contiguous()
    shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, own)
    return torch.cat(shares)[: parameter.ds_numel].clone().view(parameter.ds_shape)


def slots(optimizer: Any, parameters: Mapping[str, Any]) -> Iterator[Slot]:
    """Find trained parameters in DeepSpeed's optimizer."""
    for name, parameter in parameters.items():
        group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        here = _here(parameter)
        there = slice(start, start + here.stop - here.start)
        yield Slot(name, tuple(parameter.ds_shape), here, optimizer.fp32_partitioned_groups_flat[group], there)


@contextmanager
def flat_groups(optimizer: Any) -> Iterator[None]:
    """Let the torch optimizer inside have groups, as DeepSpeed does to load a state of its own."""
    optimizer._set_fp32_optimizer_param_groups()  # noqa: SLF001
    try:
        yield
    finally:
        optimizer._clear_fp32_optimizer_param_groups()  # noqa: SLF001
