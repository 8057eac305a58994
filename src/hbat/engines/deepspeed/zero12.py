"""ZeRO-1 and -2: every rank computes with the whole model, and steps its piece of a row of all trained weights.

A parameter's fragment is what this rank's piece has of it: all, a part or nothing. `_hp_mapping` and
`_index_in_param_group` are private names of DeepSpeed's; its public functions move whole tensors twice a step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbat.engines.deepspeed.flat import FlatLocal, Slot, forget, untested_release

#: What DeepSpeed leaves on parameters, beside what begins with `ds_`.
_LEFT = {
    "_hp_mapping", "_index_in_param_group", "_dp_group", "_zero_optimizer", "get_full_hp_param", "get_full_hp_grad",
    "set_full_hp_param", "set_full_hp_grad", "load_hp_checkpoint_state", "grad_accum", "param_idx_in_group",
}  # fmt: skip


class Fragments(FlatLocal):
    """This rank's fragments of weights and gradients."""

    def take_gradients(self) -> None:
        """Put them into `weights[...].grad`, in float32: what is added must not be rounded as bf16 gradients are."""
        for parameter in self._parameters.values():
            if (own := _mapping(parameter)) is not None:
                _widen(own.gradient_dict, own.param_group_index, own.hp_fragment.dtype)
        super().take_gradients()

    def _weight(self, parameter: Any) -> Any:
        own = _mapping(parameter)
        return _nothing(parameter) if own is None else own.hp_fragment

    def _gradient(self, parameter: Any) -> Tensor:
        if (own := _mapping(parameter)) is None:
            return _nothing(parameter)
        gradient: Tensor = own.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)  # noqa: SLF001
        address = own.lp_fragment_address
        return gradient if gradient.numel() == address.numel else gradient.narrow(0, address.start, address.numel)

    def _cut(self, tensor: Tensor, parameter: Any) -> Tensor:
        return tensor.reshape(-1)[_addresses(parameter)[0]]


def _nothing(like: Tensor) -> Tensor:
    return like.detach().new_empty(0)


def _widen(gradients: dict[int, Any], group: int, dtype: torch.dtype) -> None:
    if all(gradient.dtype == dtype for gradient in gradients[group]):
        return
    widened = [gradient.to(dtype) for gradient in gradients[group]]
    for before, gradient in zip(gradients[group], widened, strict=True):
        gradient._zero_padding = getattr(before, "_zero_padding", False)  # noqa: SLF001 - which the norm leaves out
    gradients[group] = widened


@torch.no_grad()
def release(model: nn.Module) -> None:
    """Give parameters memory of their own again, once their engine is destroyed: they are views of its row."""
    for parameter in model.parameters():
        if "_hp_mapping" not in parameter.__dict__:
            continue
        parameter.data = parameter.data.clone()
        forget(parameter, _LEFT)


def slots(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[Slot]:
    """Find trained parameters in DeepSpeed's optimizer."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in group:
            if id(parameter) in names:
                here, there = _addresses(parameter)
                yield Slot(names[id(parameter)], tuple(parameter.shape), here, flat, there)


def _addresses(parameter: Any) -> tuple[slice, slice]:
    # Of this rank's fragment in the flattened parameter and in the flat tensor.
    if (mapping := _mapping(parameter)) is None:
        return slice(0, 0), slice(0, 0)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return slice(here.start, here.start + here.numel), slice(there.start, there.start + there.numel)


def _mapping(parameter: Any) -> Any:
    try:
        return parameter._hp_mapping  # noqa: SLF001 - see above
    except AttributeError:
        raise untested_release(parameter.shape) from None
