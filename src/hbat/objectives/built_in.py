"""From the names in `objectives` to objectives."""

import importlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from transformers import TrainingArguments

from hbat.config.fields import nearest
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
}
_TRL_PPO = ("trl_ppo.objective", "trl_ppo")
#: Fields for which transformers wants packages as soon as the arguments are built.
_NEEDING_PACKAGES = ("deepspeed", "parallelism_config")


def resolve(config: HBATConfig) -> list[Objective]:
    """Turn the entries of `objectives` into objectives, in order, with their sections.

    Raises:
        ValueError: If a name is unknown, or an objective lacks what the importance is computed from.
        TypeError: If an entry is neither a name nor an `Objective`.
    """
    objectives = [entry if isinstance(entry, Objective) else _built_in(entry, config) for entry in config.objectives]
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


def _built_in(entry: object, config: HBATConfig) -> Objective:
    if not isinstance(entry, str):
        raise TypeError(f"`objectives` holds a {type(entry).__name__}; give names or `Objective` objects.")
    if entry not in BUILT_IN:
        raise ValueError(
            f"`objectives` names {entry!r}, which is not built in ({', '.join(BUILT_IN)})."
            f"{nearest(entry, BUILT_IN)} Another trainer becomes an objective with "
            "`hbat.Objective(name=..., trainer_class=..., config_class=...)`."
        )
    module, name = _TRL_PPO if (entry, config.ppo_backend) == ("ppo", "trl") else BUILT_IN[entry]
    make = getattr(importlib.import_module(f"hbat.objectives.{module}"), name)
    objective: Objective = make(config=getattr(config, entry))
    return objective
