"""An evaluation as a YAML file and the command line describe it. Imports neither torch nor TRL."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hbat.cli.run_file import override
from hbat.cli.yaml import read_yaml
from hbat.config.evaluation import Measured
from hbat.config.fields import build_section, not_an_option


@dataclass(kw_only=True)
class EvalFile(Measured):
    """What `hbat eval` measures, and where it writes. Every field has its help text."""

    output_dir: str = field(
        default="evaluation",
        metadata={"help": "Folder for scores, picture and judgments, and in a folder for each model its completions."},
    )
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`. Default: the dtype that was saved."
        },
    )


def parse_eval(path: str | None, overrides: Sequence[tuple[str, Any]]) -> EvalFile:
    """Read an evaluation from its YAML file, if there is one; `overrides` replace values by dotted key, in order.

    Raises:
        ValueError: If the file, a key or a value is invalid.
        TypeError: If a value has the wrong type.
    """
    values = {} if path is None else read_yaml(path)
    if "model_name_or_path" in values:
        raise ValueError(f"{path} is a run file, whose model is measured by `hbat eval {path} --config eval.yaml`.")
    valid = [field.name for field in dataclasses.fields(EvalFile)]
    if wrong := [key for key, _ in overrides if key.split(".")[0] not in valid]:
        raise ValueError(" ".join(not_an_option(key, [*valid, "config"], shown_as=f"--{key}") for key in wrong))
    for key, value in overrides:
        override(values, key, value)
    return build_section("", EvalFile, values)
