"""Hybrid alignment training on TRL: alternate objectives over rounds and hold back forgetting with EWC.

The public names load on first use, so that importing `hbat` costs nothing before a trainer is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbat.config.ewc import EWCConfig
    from hbat.config.hbat import HBATConfig
    from hbat.ewc.callback import EWCCallback
    from hbat.ewc.fisher import Example, diagonal_fisher
    from hbat.ewc.importance import accumulate, displacement, effective_tensors, normalize
    from hbat.ewc.log import EWCWarning
    from hbat.ewc.parameters import snapshot, trainable_parameters
    from hbat.ewc.penalty import add_penalty_gradient_, ewc_penalty, proximal_step_
    from hbat.objectives.objective import Objective
    from hbat.ppo.config import PPOConfig
    from hbat.ppo.trainer import PPOTrainer
    from hbat.reports.matrix import ForgettingMatrix
    from hbat.trainer import HBATTrainer

    __version__: str

_HOMES = {
    "EWCCallback": "hbat.ewc.callback",
    "EWCConfig": "hbat.config.ewc",
    "EWCWarning": "hbat.ewc.log",
    "Example": "hbat.ewc.fisher",
    "ForgettingMatrix": "hbat.reports.matrix",
    "HBATConfig": "hbat.config.hbat",
    "HBATTrainer": "hbat.trainer",
    "Objective": "hbat.objectives.objective",
    "PPOConfig": "hbat.ppo.config",
    "PPOTrainer": "hbat.ppo.trainer",
    "accumulate": "hbat.ewc.importance",
    "add_penalty_gradient_": "hbat.ewc.penalty",
    "diagonal_fisher": "hbat.ewc.fisher",
    "displacement": "hbat.ewc.importance",
    "effective_tensors": "hbat.ewc.importance",
    "ewc_penalty": "hbat.ewc.penalty",
    "normalize": "hbat.ewc.importance",
    "proximal_step_": "hbat.ewc.penalty",
    "snapshot": "hbat.ewc.parameters",
    "trainable_parameters": "hbat.ewc.parameters",
}

__all__ = [
    "EWCCallback",
    "EWCConfig",
    "EWCWarning",
    "Example",
    "ForgettingMatrix",
    "HBATConfig",
    "HBATTrainer",
    "Objective",
    "PPOConfig",
    "PPOTrainer",
    "__version__",
    "accumulate",
    "add_penalty_gradient_",
    "diagonal_fisher",
    "displacement",
    "effective_tensors",
    "ewc_penalty",
    "normalize",
    "proximal_step_",
    "snapshot",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("hbat-trl")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hbat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
