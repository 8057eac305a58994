"""What a run leaves for people: the table of scores as JSON and picture, and the model card."""

import json
import re
from pathlib import Path
from typing import Any

from hbat.config.hbat import HBATConfig
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.plots import draw_matrix
from hbat.state.files import write_json

RESULTS_FILE = "evaluation.json"


PICTURE_FILE = "evaluation.png"


def write_results(folder: Path, matrix: ForgettingMatrix) -> None:
    """Write the forgetting matrix as JSON.

    Args:
        folder: The run's folder.
        matrix: The matrix so far.
    """
    write_json(folder / RESULTS_FILE, matrix.as_dict())


def draw_results(folder: Path, matrix: ForgettingMatrix) -> None:
    """Draw the forgetting matrix, where matplotlib is installed.

    Args:
        folder: The run's folder.
        matrix: The matrix so far.
    """
    draw_matrix(matrix, folder / PICTURE_FILE)


def table_rows(matrix: ForgettingMatrix) -> tuple[list[str], list[list[str]]]:
    """Lay the headline scores out as cells.

    Args:
        matrix: The matrix.

    Returns:
        The head, and one row for each of the matrix, then backward transfer; a missing score is an empty cell.
    """
    head = ["after", *(f"{name} {metric}" for name, metric in matrix.headline.items())]
    rows = [[label, *("" if each is None else f"{each:.4f}" for each in values)] for label, values in matrix.lines()]
    transfer = matrix.backward_transfer()
    shown = (f"{transfer[name]:+.4f}" if name in transfer else "" for name in matrix.headline)
    return head, [*rows, ["backward transfer", *shown]]


def markdown_table(matrix: ForgettingMatrix) -> str:
    """Lay the headline scores out as a Markdown table.

    Args:
        matrix: The matrix.

    Returns:
        One line a row of the matrix, then backward transfer.
    """
    head, rows = table_rows(matrix)
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines)


def directions(matrix: ForgettingMatrix) -> str:
    """Say in words which scores are the better ones.

    Args:
        matrix: The matrix.

    Returns:
        Such as `lower is better`, with the names of the objectives where they differ.
    """
    names: dict[str, list[str]] = {}
    for name in matrix.headline:
        names.setdefault(matrix.better_of(name), []).append(name)
    if len(names) == 1:
        return f"{next(iter(names))} is better"
    return ", ".join(f"{better} is better for {' and '.join(each)}" for better, each in names.items())


def write_model_card(folder: Path, config: HBATConfig, model: Any, matrix: ForgettingMatrix) -> None:
    """Write `README.md` with what was trained, how, and what came out.

    Args:
        folder: Folder of the model.
        config: The run's configuration.
        model: The model.
        matrix: Its scores.
    """
    base = getattr(model.config, "_name_or_path", "")
    origin = (base if _is_hub_name(base) else re.split(r"[/\\]", base.rstrip("/\\"))[-1]) or "a model given in memory"
    is_adapter = hasattr(model, "peft_config")
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if _is_hub_name(base):
        front["base_model"] = base
    front["tags"] = ["hbat", "trl", *config.objective_names, *(["peft"] if is_adapter else [])]
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    ewc = "none" if config.ewc is None else json.dumps({k: v for k, v in vars(config.ewc).items() if v is not None})
    text = f"""---
{head}
---

# {Path(config.output_dir).name}

Trained from `{origin}` by hybrid alignment training ([HBAT](https://arxiv.org/abs/2406.15178)): the objectives
{", ".join(config.objective_names)} alternate over {config.num_rounds} rounds.

* elastic weight consolidation: `{ewc}`
* optimizer moments between stages: `{config.optimizer_state}`
* learning-rate schedule: `{config.lr_schedule}`; end_weight: `{config.end_weight}`
"""
    if matrix.rows:
        said = directions(matrix)
        text += f"""
## Scores after each stage

{said[:1].upper()}{said[1:]}. The reference policy of a preference score is the model at the start of the run.

{markdown_table(matrix)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _is_hub_name(name: str) -> bool:
    # The Hub refuses a card that names a folder as base model; and a folder's path is nobody else's business.
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()
