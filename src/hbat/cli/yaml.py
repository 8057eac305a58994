"""YAML as plain values only, with the numbers and booleans of YAML 1.2 and one-line error messages."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class PlainYAMLError(ValueError):
    """Text that is not YAML of plain values. The message is one line."""


class _Loader(yaml.SafeLoader):
    # PyYAML follows YAML 1.1: `1e-5` is a string, `no` a boolean (so `save_strategy: no` fails), `12:30` is 750, `010`
    # is 8 and `2026-01-31` a date.
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key.value}`", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_CORE = "tag:yaml.org,2002:"
_PLAIN = {f"{_CORE}{kind}" for kind in ("bool", "float", "int", "map", "merge", "null", "seq", "str")}

#: Limit of values with every alias expanded. A run has about a hundred; nested aliases can stand for billions.
_MOST_VALUES = 10_000

#: Scalars as YAML 1.2 reads them: pattern and first characters by type.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+0123456789."),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
}

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN and tag.removeprefix(_CORE) not in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_CORE + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))


def load_yaml(text: str) -> Any:
    """Read one YAML document as mappings, lists, strings, numbers, booleans and None, else raise PlainYAMLError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_plain(node, {}, ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise PlainYAMLError(f"{error.problem or error.context}{where}") from error
    except RecursionError:
        raise PlainYAMLError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PlainYAMLError(" ".join(str(error).split())) from error


def _require_plain(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    # Counts the values of a node, those of an alias each time it is used.
    if node in above:
        raise _refusal("a value contains itself", node)
    if node not in sizes:
        if node.tag not in _PLAIN:
            raise _refusal(f"`{node.tag.replace(_CORE, '!!')}` is not a plain value", node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = [found for item in inner for found in (item if isinstance(item, tuple) else (item,))]
        sizes[node] = 1 + sum(_require_plain(found, sizes, (*above, node)) for found in nodes)
        if sizes[node] > _MOST_VALUES:
            raise _refusal(f"its aliases expand to more than {_MOST_VALUES} values", node)
    return sizes[node]


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, else raise PlainYAMLError."""
    file = Path(path).expanduser()
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlainYAMLError(f"{file.absolute()} does not exist.") from None
    except OSError as error:
        raise PlainYAMLError(f"{file.absolute()} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PlainYAMLError(f"{file.absolute()} is not UTF-8 text ({error}).") from error
    except PlainYAMLError as error:
        raise PlainYAMLError(f"{file.absolute()} is not valid YAML: {error}.") from error
    if values is None:
        raise PlainYAMLError(f"{file.absolute()} is empty; it must contain the keys of a run.")
    if not isinstance(values, dict):
        raise PlainYAMLError(
            f"{file.absolute()} contains a {type(values).__name__}; it must contain `key: value` lines."
        )
    return values
