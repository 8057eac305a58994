"""Names of the fields that the sections of objectives take, read from source: importing TRL takes seconds."""

import ast
import functools
import importlib.util
from pathlib import Path

#: Objectives that come with the library. Each has a section of its name for its trainer's arguments.
OBJECTIVES = ("sft", "dpo", "kto", "ppo", "grpo", "rloo", "distillation")


@functools.cache
def section_fields(objective: str) -> frozenset[str]:
    """Names of the fields of an objective's arguments in the installed TRL and transformers.

    Args:
        objective: Name of its section, or `reward` for `trl.RewardConfig`.

    Returns:
        The names; none where the source is not at hand.
    """
    trl = _folder("trl")
    # TRL 1.0 has KTO among its experiments.
    places = (f"trainer/{objective}", f"experimental/{objective}/{objective}", "trainer/base")
    files = [trl / f"{place}_config.py" for place in places]
    if objective == "ppo":
        files = [Path(__file__).parents[1] / "ppo" / "config.py"]
    return frozenset().union(*map(_fields, [*files, _folder("transformers") / "training_args.py"]))


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)  # does not import it
    return Path(found.origin).parent if found and found.origin else Path("missing")


@functools.cache
def _fields(file: Path) -> frozenset[str]:
    if not file.is_file():
        return frozenset()
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = [node for found in classes for node in found.body if isinstance(node, ast.AnnAssign)]
    return frozenset(ast.unparse(field.target) for field in fields if "init=False" not in ast.unparse(field))
