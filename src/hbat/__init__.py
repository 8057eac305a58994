"""Hybrid alignment training on TRL: alternate SFT and preference training, and hold back forgetting with EWC.

`__init__.pyi` lists the public names, also errors and warnings, with their modules: for type checkers and this file,
which loads each on first use. Importing `hbat` imports neither torch nor TRL. The mathematics of EWC is `hbat.ewc`.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = sorted({"__version__", *_MODULES})  # noqa: PLE0605 - read from the stub


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("hbat-trl")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'hbat' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
