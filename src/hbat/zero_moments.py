"""Optimizer moments under DeepSpeed's ZeRO-1 and -2: put together by parameter, and cut into this process's piece.

There an optimizer has one flat tensor of each group of parameters, this process's piece of them all, and of each of
its entries one like it (DeepSpeed 0.19).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's own around another.

    Args:
        optimizer: An optimizer.

    Returns:
        True under ZeRO-1 and -2.
    """
    return hasattr(optimizer, "single_partition_of_fp32_groups")


@torch.no_grad()
def zero_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Put an optimizer's state together: a collective for each tensor.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.

    Returns:
        Entries by parameter name: whole tensors of the parameter's shape, and numbers as they are.
    """
    state = optimizer.optimizer.state
    return {
        name: {key: _whole(value, flat, each) for key, value in state.get(flat, {}).items()}
        for name, each, _, flat in _placed(optimizer, parameters)
    }


@torch.no_grad()
def load_zero_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that has not stepped yet the state of another.

    Args:
        optimizer: DeepSpeed's.
        parameters: Trained parameters by name.
        saved: What `zero_state` gave. Parameters not named start fresh, at the step of the others.
    """
    inner = optimizer.optimizer
    pieces: dict[int, dict[str, Any]] = {}  # by the number that torch gives each group's flat tensor
    for name, each, number, flat in _placed(optimizer, parameters):
        own = pieces.setdefault(number, {})
        for key, value in saved.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape == each.shape:
                here, there = _addresses(each)
                own.setdefault(key, torch.zeros_like(flat))[there].copy_(value.reshape(-1)[here])
            else:
                own[key] = value
    inner.load_state_dict(inner.state_dict() | {"state": {number: each for number, each in pieces.items() if each}})


def _placed(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter, int, Tensor]]:
    names = {id(each): name for name, each in parameters.items()}
    flats = enumerate(optimizer.single_partition_of_fp32_groups)
    for (number, flat), group in zip(flats, optimizer.bit16_groups, strict=True):
        for each in group:
            if id(each) in names:
                yield names[id(each)], each, number, flat


def _whole(value: Any, flat: Tensor, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != flat.shape:
        return value
    whole = value.new_zeros(parameter.numel())
    here, there = _addresses(parameter)
    whole[here].copy_(value[there])
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def _addresses(parameter: Any) -> tuple[slice, slice]:
    # Of this process's fragment in the parameter and in the flat tensor; empty where it has none.
    if (mapping := parameter._hp_mapping) is None:  # noqa: SLF001 - DeepSpeed has no public way without moving it all
        return slice(0, 0), slice(0, 0)
    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return (
        slice(in_parameter.start, in_parameter.start + in_parameter.numel),
        slice(in_flat.start, in_flat.start + in_flat.numel),
    )
