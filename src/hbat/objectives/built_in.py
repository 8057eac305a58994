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

#: Each name is also the section's and the function's, whose module is loaded only when asked for.
BUILT_IN: Sequence[str] = ("sft", "dpo", "kto", "ppo", "grpo", "rloo")


#: Fields for which the host wants packages as soon as a section is built.
_NEEDING_PACKAGES = ("deepspeed", "parallelism_config")


def resolve(config: HBATConfig) -> list[Objective]:
    """Turn the entries of `objectives` into objectives, with their sections.

    Args:
        config: The run's configuration.

    Returns:
        The objectives of a round, in order.

    Raises:
        ValueError: If a name is unknown, or an objective lacks what the importance is computed from.
        TypeError: If an entry is neither a name nor an `Objective`.
    """
    resolved = []
    for entry in config.objectives:
        if isinstance(entry, Objective):
            resolved.append(entry)
        elif not isinstance(entry, str):
            raise TypeError(f"`objectives` holds a {type(entry).__name__}; give names or `Objective` objects.")
        elif entry not in BUILT_IN:
            raise ValueError(
                f"`objectives` names {entry!r}, which is not built in ({', '.join(BUILT_IN)})."
                f"{nearest(entry, BUILT_IN)} Another trainer becomes an objective with "
                "`hbat.Objective(name=..., trainer_class=..., config_class=...)`."
            )
        else:
            make = getattr(importlib.import_module(_module(entry, config)), entry)
            resolved.append(make(getattr(config, entry)))
    _require_examples(config, resolved)
    return resolved


def build_sections(objectives: Sequence[Objective], config: HBATConfig) -> dict[str, TrainingArguments]:
    """Build the configuration of each objective's trainer.

    Args:
        objectives: The objectives.
        config: The run's configuration.

    Returns:
        Configurations by objective, as the user gave them.

    Raises:
        ValueError: If one cannot work inside a run.
        TypeError: If a value or a configuration is of the wrong kind.
        NotImplementedError: Under an engine that is not supported.
    """
    refuse_arguments()
    for each in objectives:
        if isinstance(each.config, Mapping):  # before the host asks for the engine's packages
            refuse_arguments(SimpleNamespace(**{key: each.config.get(key) for key in _NEEDING_PACKAGES}))
    with kept_environment():
        sections = {each.name: each.base_args(config.output_dir) for each in objectives}
    for section in sections.values():
        refuse_arguments(section)
    return sections


def _module(name: str, config: HBATConfig) -> str:
    if name == "ppo" and config.ppo_backend == "trl":
        return "hbat.objectives.trl_ppo.objective"
    return f"hbat.objectives.{'online' if name in {'grpo', 'rloo'} else name}"


def _require_examples(config: HBATConfig, objectives: Sequence[Objective]) -> None:
    ewc = config.ewc
    if ewc is None or ewc.source != "fisher" or (ewc.f_max == 0 and ewc.freeze == 0):
        return
    for each in objectives:
        if each.examples is None:
            raise ValueError(
                f"`ewc.source: fisher` needs the sequences of the objective {each.name!r}, which has no `examples`. "
                "Set `Objective(examples=...)`, or `ewc.source: displacement`."
            )
