"""Writes `docs/configuration.md` from the options' own help texts: `python docs/configuration.py`."""

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hbat.cli.eval_file import EvalFile
from hbat.cli.run_file import RunFile
from hbat.config.evaluation import JudgeConfig
from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig
from hbat.ppo.config import PPOConfig

PAGE = Path(__file__).with_suffix(".md")

_HEAD = """# Configuration

Every option with its default and help text. An option of a section is written with a dot on the command line
(`--sft.learning_rate 1e-5`); from Python a section is a mapping or a configuration object. This page is written by
`python docs/configuration.py` from the help texts in the code.
"""


def page() -> str:
    """Write the page, as Markdown."""
    run_file = [field for field in dataclasses.fields(RunFile) if field.name != "config"]
    return "\n".join([
        _HEAD,
        *_table("The run", "Fields of `hbat.HBATConfig`.", dataclasses.fields(HBATConfig)),
        *_table("What a run is made from", "Keys of a YAML file; from Python arguments of `HBATTrainer`.", run_file),
        *_table("ewc", "Fields of `hbat.EWCConfig`.", dataclasses.fields(EWCConfig)),
        "## sft, dpo, kto, grpo, rloo\n",
        "Any field of `trl.SFTConfig`, `trl.DPOConfig`, `trl.KTOConfig`, `trl.GRPOConfig` and `trl.RLOOConfig`.\n",
        *_table(
            "evaluation", "Fields of `hbat.EvalConfig`, and options of `hbat eval`.", dataclasses.fields(EvalFile)
        ),
        *_table("judge", "Section of `evaluation`.", dataclasses.fields(JudgeConfig)),
        *_table("ppo", "Fields of `hbat.PPOConfig`, besides those of `TrainingArguments`.", _own(PPOConfig)),
    ])


def _own(config_class: type) -> list["dataclasses.Field[Any]"]:
    own = inspect.get_annotations(config_class)
    return [field for field in dataclasses.fields(config_class) if field.name in own]


def _table(title: str, about: str, fields: Iterable["dataclasses.Field[Any]"]) -> list[str]:
    rows = [
        f"| `{field.name}` | {_default(field)} | {field.metadata['help'].replace('|', '&#124;')} |" for field in fields
    ]
    return [f"## {title}\n", f"{about}\n", "| option | default | help |", "|---|---|---|", *rows, ""]


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "[below](#ewc)"
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return f"`{text or str(value).replace(chr(39), '')}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
