"""Elastic weight consolidation: the mathematics (tensors in, tensors out) and, in `callback`, when it acts.

The public functions need torch alone and load on first use:

* importance: `displacement`, `add_path_`, `diagonal_fisher`, `accumulate`, `relative_importance`,
  `normalize_to_stage`, `normalize`, `effective_tensors`
* penalty: `ewc_penalty`, `add_penalty_gradient_`, `proximal_step_`
* parameters: `trainable_parameters`, `snapshot`

Of the files `importance`, `fisher` and `path` make importance, `penalty` uses it, by the `kernels` of both;
`parameters` names what is trained. `callback` acts within a `Trainer`, `log` says how it went.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbat.ewc.fisher import Example, diagonal_fisher
    from hbat.ewc.importance import (
        accumulate,
        displacement,
        effective_tensors,
        normalize,
        normalize_to_stage,
        relative_importance,
    )
    from hbat.ewc.parameters import snapshot, trainable_parameters
    from hbat.ewc.path import add_path_
    from hbat.ewc.penalty import add_penalty_gradient_, ewc_penalty, proximal_step_

_HOMES = {
    "Example": "fisher",
    "accumulate": "importance",
    "add_path_": "path",
    "add_penalty_gradient_": "penalty",
    "diagonal_fisher": "fisher",
    "displacement": "importance",
    "effective_tensors": "importance",
    "ewc_penalty": "penalty",
    "normalize": "importance",
    "normalize_to_stage": "importance",
    "proximal_step_": "penalty",
    "relative_importance": "importance",
    "snapshot": "parameters",
    "trainable_parameters": "parameters",
}

__all__ = [
    "Example",
    "accumulate",
    "add_path_",
    "add_penalty_gradient_",
    "diagonal_fisher",
    "displacement",
    "effective_tensors",
    "ewc_penalty",
    "normalize",
    "normalize_to_stage",
    "proximal_step_",
    "relative_importance",
    "snapshot",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hbat.ewc.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hbat.ewc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
