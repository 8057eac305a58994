"""From the names in `objectives` to objectives."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import trl
from transformers import Trainer, TrainingArguments

from hbat.config.fields import nearest, shown
from hbat.config.hbat import HBATConfig
from hbat.engines.checks import refuse_arguments
from hbat.engines.environment import kept_environment
from hbat.objectives.objective import Objective

#: Module and class of each built-in objective, imported on demand. The name is also that of its section.
BUILT_IN = {
    "sft": ("sft", "SFT"),
    "dpo": ("dpo", "DPO"),
    "kto": ("kto", "KTO"),
    "ppo": ("ppo", "PPO"),
    "grpo": ("online", "GRPO"),
    "rloo": ("online", "RLOO"),
    "distillation": ("distillation", "Distillation"),
}
#: What keys of a mapping in `objectives` are called as fields of `Objective`.
_OF_MAPPINGS = {"trainer_class": "trainer", "config_class": "config", "config": "args"}
#: Whose trainers can be subclassed: all that the others add lies in the trainer itself.
_EXTENDED = ("sft", "dpo", "kto")
_TRL_PPO = ("trl_ppo.objective", "trl_ppo")
#: Fields for which transformers wants packages as soon as the arguments are built.
_NEEDING_PACKAGES = ("deepspeed", "parallelism_config")


def resolve(config: HBATConfig) -> list[Objective]:
    """Turn the entries of `objectives` into objectives, in order, with their sections.

    Raises:
        ValueError: If a name is unknown, or an objective lacks what the importance is computed from.
        TypeError: If an entry is neither a name, nor a mapping, nor an `Objective`.
    """
    objectives = [_objective(entry, config) for entry in config.objectives]
    ewc = config.ewc
    if ewc is None or ewc.source != "fisher" or (ewc.strength == 0 and ewc.freeze == 0):
        return objectives
    for objective in objectives:
        if not objective.has_fisher:
            raise ValueError(
                f"`ewc.source: fisher` needs the sequences of the objective {objective.name!r}, which has no "
                "`fisher_sequences`. Override this method of `Objective`, or set `ewc.source: displacement`."
            )
    return objectives


def build_args(objectives: Sequence[Objective], config: HBATConfig) -> dict[str, TrainingArguments]:
    """Build the trainer's arguments of each objective, as the user gave them.

    Raises:
        ValueError: If they cannot work inside a run.
        TypeError: If a value or ready arguments are of the wrong type.
        NotImplementedError: Under an engine that is not supported.
    """
    refuse_arguments()
    for objective in objectives:
        if isinstance(objective.config, Mapping):  # before transformers asks for the engine's packages
            given = {key: objective.config.get(key) for key in _NEEDING_PACKAGES}
            refuse_arguments(SimpleNamespace(**given))
    with kept_environment():
        built = {
            objective.name: objective.base_args(config.output_dir, config.shared_fields) for objective in objectives
        }
    for args in built.values():
        refuse_arguments(args)
    return built


def _objective(entry: object, config: HBATConfig) -> Objective:
    if isinstance(entry, Objective):
        return entry
    if isinstance(entry, str):
        return _built_in(entry, config, config=config.section(entry))
    if not isinstance(entry, Mapping):
        raise TypeError(f"`objectives` holds a {type(entry).__name__}; give names, mappings or `Objective` objects.")
    where = f"`objectives` entry {entry['name']!r}"
    valid = {field.name for field in fields(Objective)} - _OF_MAPPINGS.keys() | set(_OF_MAPPINGS.values())
    for key in entry:
        if key not in valid:
            raise ValueError(f"{where} has the unknown key `{key}`.{nearest(str(key), sorted(valid))}")
    options = {own: entry[key] for own, key in _OF_MAPPINGS.items() if key in entry}
    options |= {key: value for key, value in entry.items() if key not in _OF_MAPPINGS.values()}
    options["config"] = config.section(entry)
    trainer = options.pop("trainer_class")
    if isinstance(options.get("config_class"), str):
        options["config_class"] = _imported(options["config_class"], where)
    if trainer in BUILT_IN:
        return _built_in(trainer, config, **options)
    trainer = _imported(trainer, where) if isinstance(trainer, str) else trainer
    return _of_trainer(trainer, options, config, where)


def _built_in(name: str, run: HBATConfig, /, **options: Any) -> Objective:
    if name not in BUILT_IN:
        raise ValueError(
            f"`objectives` names {name!r}, which is not built in ({', '.join(BUILT_IN)})."
            f"{nearest(name, BUILT_IN)} Another trainer becomes an objective with a mapping of `name`, `trainer` and "
            "`config`, or `hbat.Objective`."
        )
    module, kind = _TRL_PPO if (name, run.ppo_backend) == ("ppo", "trl") else BUILT_IN[name]
    objective: Objective = getattr(importlib.import_module(f"hbat.objectives.{module}"), kind)(**options)
    return objective


def _of_trainer(trainer: Any, options: dict[str, Any], config: HBATConfig, where: str) -> Objective:
    """The objective of a trainer class: a built-in one with its checks, if the trainer is of its kind."""
    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        raise TypeError(f"{where}: `trainer` is {shown(trainer)}, which is no `transformers.Trainer`.")
    for name in BUILT_IN:
        known = getattr(trl, f"{name.title() if name == 'distillation' else name.upper()}Trainer", None)
        if trainer is known:
            return _built_in(name, config, **options)
        if name in _EXTENDED and known is not None and issubclass(trainer, known):
            return _built_in(name, config, trainer_class=trainer, **options)
    if "config_class" not in options:
        raise ValueError(f"{where} needs `config`, the class of the arguments of {trainer.__name__}.")
    return Objective(trainer_class=trainer, **options)


def _imported(path: Any, where: str) -> Any:
    """A class by the path of its module and its name."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where} names {path!r}, which cannot be imported ({error}). Give a module and a class, such as "
            "`trl.SFTTrainer`."
        ) from error
