"""A run as a YAML file and the command line describe it. Imports neither torch nor TRL."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hbat.cli.yaml import PlainYAMLError, load_yaml, read_yaml
from hbat.config.chain import name_of, named
from hbat.config.fields import build_section, nearest, not_an_option, shown
from hbat.config.foreign import hint, is_misplaced
from hbat.config.hbat import HBATConfig
from hbat.config.section_fields import OBJECTIVES

#: Keys that hold the fields of another configuration.
SECTIONS = (*OBJECTIVES, "ewc")
#: Keys of values that do not belong into a file that is passed on; `eos_token` and the like do.
_SECRET = re.compile(r"^token$|(hub|hf|access|auth)_token$|api_key$|password$|secret$", re.IGNORECASE)
_REQUIRED = ("model_name_or_path", "output_dir", "datasets")


@dataclass(kw_only=True)
class RunFile:
    """The configuration of a run, and its model, data and rewards. Every field has its help text."""

    config: HBATConfig
    model_name_or_path: str = field(
        metadata={"help": "Causal language model: name on the Hugging Face Hub or local folder."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer: name on the Hub or local folder. Default: the model's."}
    )
    datasets: dict[str, Any] = field(
        metadata={
            "help": "Training data by objective: a name on the Hub, a file, or a mapping of `path`, `name`, `split`, "
            "`data_files`, `data_dir`, `revision`, `layout`, `columns`, `roles`, `rows`, `weight`, `shuffle`, `seed`, "
            "`eval_split`; or a list of these. Files: .jsonl, .json, .csv (or with .gz), .parquet."
        }
    )
    eval_datasets: dict[str, Any] | None = field(
        default=None, metadata={"help": "Evaluation data by objective, scored after every stage."}
    )
    reward_funcs: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward function of `ppo`, `grpo` and `rloo`, or a list of them: `package.module:function`, "
            "`path/to/file.py:function`, or a sequence classification model by name on the Hub or local folder."
        },
    )
    peft: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fields of peft.LoraConfig: train an adapter. `{}`: PEFT's defaults."}
    )
    quantization: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Fields of transformers.BitsAndBytesConfig for the frozen base model of an adapter (QLoRA)."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Whether `hbat train` uploads model, card and scores to the Hub at the end. From Python, call "
            "`trainer.push_to_hub()`."
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository for `push_to_hub`, such as `org/name`. Default: the name of `output_dir`."},
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={"help": "Whether `push_to_hub` makes a private repository. Default: what the organization has set."},
    )
    env: dict[str, Any] | None = field(
        default=None, metadata={"help": "Environment variables, set before torch and transformers are imported."}
    )

    def __post_init__(self) -> None:
        names = self.config.objective_names
        for entry in self.config.objectives:
            if isinstance(entry, str) and entry not in OBJECTIVES:
                raise ValueError(
                    f"`objectives` names {entry!r}, which is not built in ({', '.join(OBJECTIVES)})."
                    f"{nearest(entry, OBJECTIVES)} Name another trainer by a mapping of `name` and `trainer`."
                )
        self.datasets = _by_objective("datasets", self.datasets, names)
        self.eval_datasets = _by_objective("eval_datasets", self.eval_datasets or {}, names)
        for name in names:
            if name not in self.datasets:
                raise ValueError(f"`datasets.{name}` is missing: the objective {name!r} has no training data.")
        for key, value in (self.env or {}).items():
            if isinstance(value, Mapping | list) or value is None:
                raise ValueError(f"`env.{key}` is {shown(value)}; it must be a string or a number.")

    def set_environment(self) -> None:
        """Set the variables of `env`. Most of them are read when torch and transformers are imported."""
        os.environ.update({str(key): str(value) for key, value in (self.env or {}).items()})


def parse(path: str | Path, overrides: Sequence[tuple[str, Any]] = (), options: Iterable[str] = ()) -> RunFile:
    """Read a run from its YAML file; `overrides` replace values by dotted key, in order.

    Args:
        path: The file.
        overrides: Pairs of key and value, as from `parse_overrides`.
        options: Options of the command itself, which a misspelled key may be meant for.

    Returns:
        The run. Sections for TRL are checked only when the trainer is built.

    Raises:
        ValueError: If the file, a key or a value is invalid; all wrong keys are named.
        TypeError: If a value has the wrong type.
    """
    return from_values(read_yaml(path), str(path), overrides, options)


def from_values(
    values: dict[str, Any], path: str, overrides: Sequence[tuple[str, Any]] = (), options: Iterable[str] = ()
) -> RunFile:
    """Make a run of the values of a file, as `parse`."""
    valid = [field.name for field in described_keys()]
    valid += [name for name in _names(values) if name not in valid]
    wrong = [key for key, _ in overrides if key.split(".")[0] not in valid]
    for key, value in overrides:
        if key not in wrong:
            override(values, key, value)
    names = _names(values)
    _take_sections(values)
    problems = [not_an_option(key.split(".")[0], [*valid, *options], names, shown_as=f"--{key}") for key in wrong]
    problems += _wrong_keys(values, valid, names, path)
    if problems:
        raise ValueError(" ".join(problems))
    for key in _REQUIRED:
        if values.get(key) is None:
            raise ValueError(f"`{key}` is missing: set it in {path} or with `--{key}`.")
    for key in SECTIONS:
        if not isinstance(values.get(key), Mapping | None):
            raise TypeError(f"`{key}` is {shown(values[key])}; it must be a mapping or null.")
    own = {key: values.pop(key) for key in [*values] if key in RunFile.__dataclass_fields__}
    return build_section("", RunFile, {"config": build_section("", HBATConfig, values)} | own)


def _take_sections(values: dict[str, Any]) -> None:
    """Make sections of objectives that are not built in the `args` of their entries."""
    if not isinstance(values.get("objectives"), list) or not values["objectives"]:
        return
    entries = values["objectives"] = named(values["objectives"])
    for index, entry in enumerate(entries):
        name = name_of(entry)
        if isinstance(entry, Mapping) and name in values and name not in OBJECTIVES:
            if not isinstance(values[name], Mapping | None):
                raise TypeError(f"`{name}` is {shown(values[name])}; it must be a mapping or null.")
            if "args" in entry:
                raise ValueError(f"`{name}` is a section, and its entry in `objectives` has `args` too. Remove one.")
            entries[index] = {**entry, "args": values.pop(name) or {}}


def _names(values: Mapping[str, Any]) -> list[str]:
    given = values.get("objectives")
    try:
        return [name_of(entry) for entry in named(given)] if isinstance(given, list) and given else ["sft", "dpo"]
    except ValueError:  # which the configuration raises again, once all keys are known to be right
        return ["sft", "dpo"]


def _wrong_keys(values: Mapping[str, Any], valid: Sequence[str], names: Sequence[str], path: str) -> Iterator[str]:
    """Say of all keys that are none where they belong, also of those in sections that are known from elsewhere."""
    flat = [str(key) for key in values if key not in valid]
    yield from (not_an_option(key, valid, names) for key in flat)
    for section in (*OBJECTIVES, "peft", "quantization"):
        inner = values.get(section)
        for key in map(str, inner) if isinstance(inner, Mapping) else ():
            if is_misplaced(section, key):
                meant = [section] if section in OBJECTIVES else names
                yield not_an_option(key, (), meant, shown_as=f"{section}.{key}")
    if isinstance(given := values.get("datasets"), list):
        yield f"`datasets` is {shown(given)}; it must be a mapping. Set `datasets.{names[0]}` to this list."
    if any(hint(key, names) for key in flat):
        yield f"`hbat migrate {path}` makes a run file of one for TRL, LLaMA-Factory or axolotl."


def as_it_runs(path: str | Path, overrides: Sequence[tuple[str, Any]]) -> str:
    """Write a run file with the values that replace its own, to keep beside the run: without `env` and secrets."""
    values = read_yaml(path)
    for key, value in overrides:
        override(values, key, value)
    values.pop("env", None)
    text: str = yaml.safe_dump(_without_secrets(values), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _without_secrets(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_secrets(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {key: _without_secrets(value) for key, value in values.items() if not _SECRET.search(str(key))}


def described_keys() -> list["dataclasses.Field[Any]"]:
    """List the dataclass field that describes it for every key of a run file."""
    own = [field for field in dataclasses.fields(RunFile) if field.name != "config"]
    return [*own, *dataclasses.fields(HBATConfig)]


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Parse `--key value`, `--key=value` and `--key` (true), with dots into sections, to keys and values in order.

    Raises:
        ValueError: If an argument has no key before it, or a value is not YAML.
    """
    found: list[tuple[str, Any]] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise ValueError(
                f"`{word}` belongs to no option. Write `--key value`, or a list as `--key [first,second]`."
            )
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found.append((key, _value(key, text)))
    return found


def _value(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except PlainYAMLError as problem:
        raise ValueError(f"`--{key}` is {shown(text)}, which is not YAML ({problem}). Put it in quotes.") from None


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key, making sections that are not there; TypeError where one is no mapping."""
    *path, last = key.split(".")
    section = values
    for depth, name in enumerate(path, start=1):
        if section.get(name) is None:
            section[name] = {}
        if not isinstance(section[name], dict):
            where = ".".join(path[:depth])
            raise TypeError(f"`--{key}` cannot be set: `{where}` is {shown(section[name])}, which is not a mapping.")
        section = section[name]
    section[last] = value


def _by_objective(section: str, sources: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in sources:
        if name not in names:
            raise ValueError(
                f"`{section}.{name}` has no objective: `objectives` is {list(names)}.{nearest(str(name), names)}"
            )
    return {name: source for name, source in sources.items() if source is not None}
