"""Optimizer moments that outlive a stage: kept by parameter name, given back to the same objective's next stage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.deepspeed.zero3 import is_zero3, load_zero3_state, zero3_state
from hbat.engines.deepspeed.zero12 import is_zero, load_zero_state, zero_state
from hbat.engines.sharded import shared_as
from hbat.ewc.parameters import trainable_parameters

_SEPARATOR = "::"  # between parameter and entry; no parameter name holds it


def moments(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read an optimizer's per-parameter state.

    Args:
        optimizer: A torch optimizer, or accelerate's wrapper of one.
        parameters: Trainable parameters by name.

    Returns:
        Tensors by `parameter::entry`, not copied; plain numbers as int64 or float64 tensors of shape `()`.
    """
    inner = _inner(optimizer)
    if is_zero(inner):
        states = zero_state(inner, parameters)
    elif is_zero3(inner):
        states = zero3_state(inner, parameters)
    else:
        states = {name: inner.state.get(each, {}) for name, each in parameters.items()}
    return {
        f"{name}{_SEPARATOR}{key}": value if isinstance(value, Tensor) else _as_tensor(value)
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor | int | float)
    }


def load_moments(optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Give an optimizer the per-parameter state of another, and keep its own learning rates.

    Args:
        optimizer: A torch optimizer, or accelerate's wrapper of one, that has not stepped yet.
        parameters: Trainable parameters by name.
        saved: What `moments` read; the optimizer goes on in these tensors. Parameters not named start fresh.
    """
    inner = _inner(optimizer)
    by_parameter: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        name, entry = key.rsplit(_SEPARATOR, 1)
        plain = value.dtype in {torch.int64, torch.float64} and value.dim() == 0
        if plain:
            by_parameter.setdefault(name, {})[entry] = value.item()
        elif name in parameters:  # from disk it comes as a whole
            by_parameter.setdefault(name, {})[entry] = shared_as(value, parameters[name])
    if is_zero(inner):
        load_zero_state(inner, parameters, by_parameter)
        return
    if is_zero3(inner):
        load_zero3_state(inner, parameters, by_parameter)
        return
    state = inner.state_dict()
    order = [each for group in inner.param_groups for each in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    number_of = {id(each): number for each, number in zip(order, numbers, strict=True)}
    state["state"] = {
        number_of[id(each)]: by_parameter[name]
        for name, each in parameters.items()
        if name in by_parameter and id(each) in number_of
    }
    inner.load_state_dict(state)


class CarryMoments(TrainerCallback):
    """Starts a stage from the moments of its objective's last stage, and keeps them at its end.

    Passing the old optimizer to the new trainer instead would train at the old learning rates, as torch's schedulers
    take the rate that they find in it.

    Args:
        saved: Moments to start from; empty for none.
    """

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        self.saved = saved

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the moments, unless the stage goes on from a checkpoint that has its own."""
        if model is not None and self.saved and state.global_step == 0:
            load_moments(kwargs["optimizer"], trainable_parameters(model), self.saved)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the moments."""
        if model is not None:
            # On the CPU, so that the moments of objectives that do not train take no accelerator memory.
            current = moments(kwargs["optimizer"], trainable_parameters(model))
            self.saved = {**self.saved, **_in_own_memory({key: each.cpu() for key, each in current.items()})}


def _in_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # bitsandbytes gives all parameters one table of its eight-bit numbers; safetensors refuses to save it twice.
    seen: set[int] = set()
    own = {}
    for key, each in tensors.items():
        own[key] = each.clone() if each.data_ptr() in seen else each
        seen.add(each.data_ptr())
    return own


def _as_tensor(number: float) -> Tensor:
    # bitsandbytes counts its steps in a plain int, and takes nothing else back.
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
