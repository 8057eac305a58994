"""Reading YAML as plain values only, with the numbers and booleans of YAML 1.2, and every fault as one line."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class PlainYAMLError(ValueError):
    """Text that is no YAML of plain values. The message is one line."""


class _Loader(yaml.SafeLoader):
    # PyYAML follows YAML 1.1, where `1e-5` is a text, `no` a boolean (so that `save_strategy: no` fails), `12:30` the
    # number 750, `010` the number 8 and `2026-01-31` a date.
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_CORE = "tag:yaml.org,2002:"


_REPLACED = (f"{_CORE}bool", f"{_CORE}float", f"{_CORE}int")


_PLAIN = {f"{_CORE}{kind}" for kind in ("bool", "float", "int", "map", "merge", "null", "seq", "str")}


#: Values of a document with every alias written out. A run has about a hundred; a few lines of aliases of aliases can
#: stand for billions.
_MOST_VALUES = 10_000


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN and tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(_REPLACED[0], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


_Loader.add_implicit_resolver(
    _REPLACED[1],
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


_Loader.add_implicit_resolver(
    _REPLACED[2], re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$"), list("-+0123456789")
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
    # Counts the values of a node, those of an alias as often as it stands there.
    if node in above:
        raise _refusal("a value holds itself", node)
    if node not in sizes:
        if node.tag not in _PLAIN:
            raise _refusal(f"`{node.tag.replace(_CORE, '!!')}` is not a plain value", node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        sizes[node] = 1 + sum(_require_plain(part, sizes, (*above, node)) for part in parts)
        if sizes[node] > _MOST_VALUES:
            raise _refusal(f"its aliases stand for more than {_MOST_VALUES} values", node)
    return sizes[node]


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


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
