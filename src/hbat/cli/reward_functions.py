"""The reward functions that a run file names: from modules, from files, or models."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hbat.config.fields import nearest

_FORMS = "`package.module:function`, `path/to/file.py:function`, or the name or folder of a model"


def load_reward_functions(given: str | list[str] | None) -> list[Any] | None:
    """Import the reward functions of a run; models stay names."""
    if given is None:
        return None
    names = [given] if isinstance(given, str) else given
    keys = ["`reward_funcs`"] if len(names) == 1 else [f"`reward_funcs[{index}]`" for index in range(len(names))]
    return [_load(name, key) for name, key in zip(names, keys, strict=True)]


def _reachable(folder: Path) -> None:
    # As `python -m hbat` and a script would; at the end, so that nothing there takes the place of an installed module.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def load_object(text: str, key: str, forms: str = "`package.module:name` or `path/to/file.py:name`") -> Any:
    """Import what a text names by its module or file; `key` is what it is the value of, for messages.

    Raises:
        ValueError: If there is no such thing, or its module cannot be imported.
    """
    place, _, name = str(text).rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"{key} is {text!r}, which names no function or class. Give {forms}.")
    module = _from_file(place, key) if place.endswith(".py") else _from_package(place, key)
    if not hasattr(module, name):
        close = nearest(name, [known for known in vars(module) if not known.startswith("_")])
        raise ValueError(f"{key}: {place} has no `{name}`.{close}")
    return getattr(module, name)


def _load(text: str, key: str) -> Any:
    place, colon, function = text.rpartition(":")
    if not colon and text.strip() and not text.endswith(".py"):
        return text  # a model
    found = load_object(text, key, _FORMS)
    if not callable(found):
        raise TypeError(
            f"{key}: `{function}` of {place} is a {type(found).__name__}, not a function of `prompts` and "
            "`completions` that returns a list of numbers."
        )
    return found


def _from_package(name: str, key: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: there is no module {error.name!r}. Install it, or give a file: `path/to/file.py:function`."
        ) from error
    except Exception as error:
        raise ValueError(f"{key}: importing {name!r} failed: {type(error).__name__}: {error}") from error


def _from_file(path: str, key: str) -> ModuleType:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        if not file.parent.is_dir():
            raise ValueError(f"{key}: there is no file {file} (and no folder {file.parent}).")
        hint = nearest(file.name, [path.name for path in file.parent.iterdir()])
        raise ValueError(f"{key}: there is no file {file}.{hint}")
    name = f"hbat_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key}: {file} cannot be imported as a module.")
    _reachable(file.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and worker processes look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{key}: importing {file} failed: {type(error).__name__}: {error}") from error
    return module
