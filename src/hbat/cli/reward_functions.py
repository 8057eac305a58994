"""Reward functions as a run file names them: functions of modules and files, and models."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hbat.config.fields import nearest

_FORMS = "`package.module:function`, `path/to/file.py:function`, or the name or folder of a model"


def load_reward_functions(given: str | list[str] | None) -> list[Any] | None:
    """Import the reward functions of a run.

    Args:
        given: One or several, each a function by module or file, or a model by name or folder.

    Returns:
        Functions, and models by name, in order; None where none is given.

    Raises:
        ValueError: If a function cannot be imported. The message says which and why.
        TypeError: If it is no function.
    """
    if given is None:
        return None
    names = [given] if isinstance(given, str) else given
    return [
        _load(each, "`reward_funcs`" if len(names) == 1 else f"`reward_funcs[{at}]`") for at, each in enumerate(names)
    ]


def _load(text: str, key: str) -> Any:
    place, colon, function = text.rpartition(":")
    if not colon:
        if not text.strip() or text.endswith(".py"):
            raise ValueError(f"{key} is {text!r}, which names no function. Give {_FORMS}.")
        return text
    if not place or not function.isidentifier():
        raise ValueError(f"{key} is {text!r}, which names no function. Give {_FORMS}.")
    module = _from_file(place, key) if place.endswith(".py") else _from_package(place, key)
    if not hasattr(module, function):
        close = nearest(function, [name for name in vars(module) if not name.startswith("_")])
        raise ValueError(f"{key}: {place} has no function `{function}`.{close}")
    found = getattr(module, function)
    if not callable(found):
        raise TypeError(
            f"{key}: `{function}` of {place} is a {type(found).__name__}, not a function from `prompts` and "
            "`completions` to a list of numbers."
        )
    return found


def _from_package(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: there is no module {error.name!r}. Install it, or name a file: `path/to/file.py:function`."
        ) from error
    except Exception as error:
        raise ValueError(f"{key}: importing {name!r} failed: {type(error).__name__}: {error}") from error


def _from_file(path: str, key: str) -> ModuleType:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        known = [each.name for each in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.parent.is_dir() else f" (nor is there a folder {file.parent})"
        raise ValueError(f"{key}: there is no file {file}{where}.{nearest(file.name, known)}")
    name = f"hbat_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key}: {file} cannot be imported as a module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and worker processes look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{key}: importing {file} failed: {type(error).__name__}: {error}") from error
    return module
