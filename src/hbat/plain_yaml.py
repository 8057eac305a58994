"""Reading YAML as plain values only, with the numbers and booleans of YAML 1.2, and every fault as one line."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class PlainYAMLError(ValueError):
    """Text that is no YAML of plain values. The message is one line."""


class _Loader(yaml.SafeLoader):
    # PyYAML follows YAML 1.1, where `1e-5` is a text and `no` a boolean (so that `save_strategy: no` fails).
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_REPLACED[0], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _REPLACED[1],
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """Read YAML as plain values.

    Args:
        text: One document.

    Returns:
        Mappings, lists, texts, numbers, booleans and None.

    Raises:
        PlainYAMLError: If it is no YAML, holds more than plain values, or a key stands twice.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise PlainYAMLError(f"{error.problem or error.context}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise PlainYAMLError(" ".join(str(error).split())) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.

    Returns:
        Its values.

    Raises:
        PlainYAMLError: If it is not there, empty, no YAML or no mapping.
    """
    file = Path(path).expanduser()
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlainYAMLError(f"There is no file {file.absolute()}.") from None
    except OSError as error:
        raise PlainYAMLError(f"{file.absolute()} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PlainYAMLError(f"{file.absolute()} is not UTF-8 text ({error}).") from error
    except PlainYAMLError as error:
        raise PlainYAMLError(f"{file.absolute()} is not valid YAML: {error}.") from error
    if values is None:
        raise PlainYAMLError(f"{file.absolute()} is empty; it must hold the keys of a run.")
    if not isinstance(values, dict):
        raise PlainYAMLError(f"{file.absolute()} holds a {type(values).__name__}; it must hold `key: value` lines.")
    return values
