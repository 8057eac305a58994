"""Optimizer moments that outlive a stage: kept by parameter name, given back to the same objective's next stage."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from hbat.engines.engine import Engine
from hbat.engines.sharded import shared_as
from hbat.ewc.parameters import trainable_parameters

_SEPARATOR = "::"  # between parameter and entry; no parameter name holds it
#: Entries of an optimizer's state that are statistics of gradients, or count steps. Anything else could be tied to the
#: weights, as the copy `z` of schedule-free optimizers is (loading it would undo the other objective in one step), or
#: to a projection, as in GaLore and APOLLO.
_MOMENTS = {
    "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_inf", "momentum_buffer",  # torch
    "square_avg", "grad_avg", "sum", "acc_delta", "mu_product", "eta", "mu", "prev", "step_size",  # torch
    "row_var", "col_var", "variance",  # torch's Adafactor
    "exp_avg_sq_row", "exp_avg_sq_col", "RMS",  # transformers' Adafactor
    "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2",  # bitsandbytes
    "gnorm_vec", "unorm_vec",  # bitsandbytes
}  # fmt: skip


class MomentsWarning(UserWarning):
    """The optimizer's state is more than moments, so a stage starts from a new one."""


def moments(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Read an optimizer's state, if it is moments alone.

    Args:
        states: State by parameter name, as `Engine.optimizer_state` gives it.

    Returns:
        Tensors by `parameter::entry`, not copied; plain numbers as int64 or float64 tensors of shape `()`. Nothing,
        with a `MomentsWarning`, where the state holds anything else.
    """
    entries = {(name, key): value for name, state in states.items() for key, value in state.items()}
    foreign = sorted({key for (_, key), value in entries.items() if key not in _MOMENTS or not _is_plain(value)})
    if foreign:
        warnings.warn(
            f"The optimizer keeps {foreign}, which may depend on the weights and not on gradients alone: it is reset "
            "between stages. Set `optimizer_state: reset`, or use an optimizer such as 'adamw_torch'.",
            MomentsWarning,
            stacklevel=2,
        )
        return {}
    return {
        f"{name}{_SEPARATOR}{key}": value if isinstance(value, Tensor) else _as_tensor(value)
        for (name, key), value in entries.items()
        if value is not None
    }


def states(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Turn what `moments` read back into states by parameter name."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        name, entry = key.rsplit(_SEPARATOR, 1)
        if value.dtype in {torch.int64, torch.float64} and value.dim() == 0:
            found.setdefault(name, {})[entry] = value.item()
        elif name in parameters:  # from disk it comes whole
            found.setdefault(name, {})[entry] = shared_as(value, parameters[name])
    return found


class CarryMoments(TrainerCallback):
    """Starts a stage from the moments of its objective's last stage, and keeps them at its end.

    Passing the old optimizer to the new trainer instead would train at the old learning rates, as torch's schedulers
    take the rate that they find in it.
    """

    def __init__(self, saved: Mapping[str, Tensor], engine: Engine) -> None:
        self.saved = saved
        self._engine = engine

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Load the moments, unless the stage resumes from a checkpoint that has its own."""
        if self.saved and state.global_step == 0:
            parameters = trainable_parameters(model)
            loaded = states(self.saved, parameters)
            self._engine.load_optimizer_state(_inner(kwargs["optimizer"]), parameters, loaded)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the moments."""
        current = moments(self._engine.optimizer_state(_inner(kwargs["optimizer"]), trainable_parameters(model)))
        # On the CPU, so that the moments of objectives that do not train take no accelerator memory.
        self.saved = {**self.saved, **_in_own_memory({key: tensor.cpu() for key, tensor in current.items()})}


def _in_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # bitsandbytes gives all parameters one table of its eight-bit numbers; safetensors refuses to save it twice.
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        own[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def _is_plain(value: Any) -> bool:
    # torchao keeps eight-bit moments in tensors of classes of its own, which no file holds.
    return value is None or type(value) in {Tensor, nn.Parameter, DTensor, int, float}


def _as_tensor(number: float) -> Tensor:
    # bitsandbytes counts its steps in a plain int, and takes nothing else back.
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
