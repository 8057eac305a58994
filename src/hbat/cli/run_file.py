"""A run as a YAML file and the command line describe it: its keys, checked without the host. Imports no trainer."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbat.cli.yaml import PlainYAMLError, load_yaml, read_yaml
from hbat.config.fields import build_section, nearest, shown
from hbat.config.hbat import HBATConfig

#: Keys that hold the fields of another configuration.
SECTIONS = ("sft", "dpo", "kto", "ppo", "grpo", "rloo", "ewc")


_REQUIRED = ("model_name_or_path", "output_dir", "datasets")


@dataclass(kw_only=True)
class RunFile:
    """A run: its configuration, and what it is made from. The help of each field is its description."""

    config: HBATConfig
    model_name_or_path: str = field(
        metadata={"help": "Causal language model: a name on the Hugging Face Hub or a folder."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's own."}
    )
    datasets: dict[str, Any] = field(
        metadata={
            "help": "Training rows by objective: name on the Hub, file, list of files, or a mapping with `path`, "
            "`name`, `split`, `data_files` and `revision`. Files: .jsonl, .json, .csv, each also .gz; .parquet."
        }
    )
    eval_datasets: dict[str, Any] | None = field(
        default=None, metadata={"help": "Evaluation rows by objective, scored after every stage."}
    )
    reward_funcs: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "What `ppo`, `grpo` and `rloo` learn from, one or a list: `package.module:function`, "
            "`path/to/file.py:function`, or a sequence-classification model by name on the Hub or folder."
        },
    )
    peft: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fields of peft.LoraConfig: train an adapter. `{}` takes PEFT's defaults."}
    )
    quantization: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Fields of transformers.BitsAndBytesConfig for the frozen weights below an adapter."},
    )
    env: dict[str, Any] | None = field(
        default=None, metadata={"help": "Environment variables, set before the host is imported."}
    )

    def __post_init__(self) -> None:
        names = self.config.objective_names
        self.datasets = _by_objective("datasets", self.datasets, names)
        self.eval_datasets = _by_objective("eval_datasets", self.eval_datasets or {}, names)
        missing = [name for name in names if name not in self.datasets]
        if missing:
            raise ValueError(f"`datasets.{missing[0]}` is missing: the objective {missing[0]!r} has no rows.")
        for key, value in (self.env or {}).items():
            if isinstance(value, Mapping | list) or value is None:
                raise ValueError(f"`env.{key}` is {shown(value)}; it must be a text or a number.")

    def set_environment(self) -> None:
        """Set the variables of `env`. The hosts read most of them when they are imported."""
        os.environ.update({str(key): str(value) for key, value in (self.env or {}).items()})


def parse(path: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> RunFile:
    """Read a run from its YAML file.

    Args:
        path: The file.
        overrides: Dotted keys and their values, which replace those of the file in the order given.

    Returns:
        The run. The host's sections are taken as they are; building the trainer checks them.

    Raises:
        ValueError: If file, key or value cannot be used.
        TypeError: If a value has the wrong type.
    """
    values = read_yaml(path)
    for key, value in overrides:
        _override(values, key, value)
    valid = [name for name, _ in described_keys()]
    for key in values:
        if key not in valid:
            raise ValueError(f"`{key}` is not an option.{nearest(str(key), valid)}")
    for key in _REQUIRED:
        if values.get(key) is None:
            raise ValueError(f"`{key}` is missing: set it in {path}, or on the command line as `--{key}`.")
    for key in SECTIONS:
        if not isinstance(values.get(key), Mapping | None):
            raise TypeError(f"`{key}` is {shown(values[key])}; it must be a mapping or null.")
    own = {each.name for each in dataclasses.fields(RunFile)}
    config = build_section("", HBATConfig, {key: value for key, value in values.items() if key not in own})
    rest = {key: value for key, value in values.items() if key in own}
    return build_section("", RunFile, {"config": config} | rest)


def described_keys() -> list[tuple[str, "dataclasses.Field[Any]"]]:
    """List the keys of a run file.

    Returns:
        Each key with the field that describes it: first what a run is made from, then its configuration.
    """
    made_from = [each for each in dataclasses.fields(RunFile) if each.name != "config"]
    return [(each.name, each) for each in [*made_from, *dataclasses.fields(HBATConfig)]]


def parse_overrides(words: Sequence[str], known: Iterable[str] = ()) -> list[tuple[str, Any]]:
    """Read `--key value`, `--key=value` and `--key` (true), with dots between the parts of a key.

    Args:
        words: The words of the command line.
        known: Options of the command itself, for the hint after a misspelt one.

    Returns:
        Keys and values in order.

    Raises:
        ValueError: If a word belongs to no key, or a value is no YAML.
    """
    found: list[tuple[str, Any]] = []
    waiting = list(words)
    valid = [*known, *(name for name, _ in described_keys())]
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise ValueError(
                f"`{word}` belongs to no option. Options are `--key value`; several values are one list: "
                "`--key [first,second]`."
            )
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key.split(".")[0] not in valid:
            raise ValueError(f"`--{key}` is not an option.{nearest(key.split('.')[0], valid)}")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found.append((key, _value(key, text)))
    return found


def _value(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except PlainYAMLError as problem:
        raise ValueError(
            f"`--{key}` is {shown(text)}, which is no YAML value ({problem}). Put it in quotes."
        ) from None


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place = values
    for depth, name in enumerate(path):
        if place.get(name) is None:
            place[name] = {}
        if not isinstance(place[name], dict):
            where = ".".join(path[: depth + 1])
            raise TypeError(f"`--{key}` cannot be set: `{where}` is {shown(place[name])}, which is not a mapping.")
        place = place[name]
    place[last] = value


def _by_objective(section: str, sources: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in sources:
        if name not in names:
            raise ValueError(
                f"`{section}.{name}` has no objective: `objectives` is {list(names)}.{nearest(str(name), names)}"
            )
    return {name: source for name, source in sources.items() if source is not None}
