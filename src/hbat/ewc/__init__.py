"""Elastic weight consolidation: the mathematics (tensors in, tensors out) and, in `callback`, when it acts.

The public functions need torch alone and load on first use, by the list in `__init__.pyi`:

* importance: `displacement`, `add_path_`, `diagonal_fisher`, `accumulate`, `relative_importance`,
  `normalize_to_stage`, `normalize`, `effective_tensors`
* penalty: `ewc_penalty`, `add_penalty_gradient_`, `proximal_step_`
* parameters: `trainable_parameters`, `snapshot`

Of the files `importance`, `fisher` and `path` make importance, `penalty` uses it, by the `kernels` of both;
`parameters` names what is trained. `callback` acts within a `Trainer`, `log` says how it went.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - read from the stub


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'hbat.ewc' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
