"""Optimizer moments under DeepSpeed's ZeRO-3: put together by parameter, and cut into this process's shares.

There an optimizer has flat tensors, each of this process's shares of some parameters, and of each of its entries one
like it. It knows its flat tensors during its step alone (DeepSpeed 0.19).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbat.ewc.partitions import share_of, whole_of_share


def is_zero3(optimizer: Any) -> bool:
    """Whether an optimizer is ZeRO-3's own around another.

    Args:
        optimizer: An optimizer.

    Returns:
        True under ZeRO-3 alone.
    """
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


@torch.no_grad()
def zero3_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Put an optimizer's state together: a collective for each tensor.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.

    Returns:
        Entries by parameter name: whole tensors of the parameter's shape, and numbers as they are.
    """
    state = optimizer.optimizer.state
    return {
        name: {
            key: whole_of_share(value[place], each) if _is_like(value, flat) else value
            for key, value in state.get(flat, {}).items()
        }
        for name, each, flat, place in _placed(optimizer, parameters)
    }


@torch.no_grad()
def load_zero3_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that has not stepped yet the state of another.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.
        saved: What `zero3_state` gave. Parameters not named start fresh, at the step of the others.
    """
    pieces: dict[Tensor, dict[str, Any]] = {}
    for name, each, flat, place in _placed(optimizer, parameters):
        own = pieces.setdefault(flat, {})
        for key, value in saved.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape == each.ds_shape:
                share = share_of(value, each)
                own.setdefault(key, torch.zeros_like(flat))[place][: share.numel()].copy_(share)
            else:
                own[key] = value
    inner = optimizer.optimizer
    optimizer._set_fp32_optimizer_param_groups()  # noqa: SLF001 - as it does to load a state of its own
    try:
        numbers = {id(each): number for number, each in enumerate(_flats(inner))}
        state = {numbers[id(flat)]: own for flat, own in pieces.items() if own}
        inner.load_state_dict(inner.state_dict() | {"state": state})
    finally:
        optimizer._clear_fp32_optimizer_param_groups()  # noqa: SLF001 - as above


def _flats(inner: Any) -> Iterator[Tensor]:
    for group in inner.param_groups:
        yield from group["params"]


def _placed(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Any, Tensor, slice]]:
    for name, each in parameters.items():
        group, start, count = optimizer.grad_position[optimizer.get_param_id(each)]
        yield name, each, optimizer.fp32_partitioned_groups_flat[group], slice(start, start + count)


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
