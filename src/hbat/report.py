"""What a run leaves for people: the table of scores as JSON and picture, and the model card."""

import json
from pathlib import Path
from typing import Any

from hbat.config import HBATConfig
from hbat.evaluation import ForgettingMatrix
from hbat.plots import draw_matrix
from hbat.run_state import write_json

RESULTS_FILE = "evaluation.json"
PICTURE_FILE = "evaluation.png"


def write_results(folder: Path, matrix: ForgettingMatrix) -> None:
    """Write the forgetting matrix as JSON, and as a picture where matplotlib is installed.

    Args:
        folder: The run's folder.
        matrix: The matrix so far.
    """
    write_json(folder / RESULTS_FILE, matrix.as_dict())
    draw_matrix(matrix, folder / PICTURE_FILE)


def markdown_table(matrix: ForgettingMatrix) -> str:
    """Lay the headline scores out as a Markdown table.

    Args:
        matrix: The matrix.

    Returns:
        One line a row of the matrix, then backward transfer.
    """
    names = list(matrix.headline)
    head = "| after | " + " | ".join(f"{name} {matrix.headline[name]}" for name in names) + " |"
    lines = [head, "|---|" + "---:|" * len(names)]
    for label, values in matrix.lines():
        lines.append(f"| {label} | " + " | ".join("" if each is None else f"{each:.4f}" for each in values) + " |")
    transfer = matrix.backward_transfer()
    shown = " | ".join(f"{transfer[name]:+.4f}" if name in transfer else "" for name in names)
    return "\n".join([*lines, f"| backward transfer | {shown} |"])


def write_model_card(folder: Path, config: HBATConfig, model: Any, matrix: ForgettingMatrix) -> None:
    """Write `README.md` with what was trained, how, and what came out.

    Args:
        folder: Folder of the model.
        config: The run's configuration.
        model: The model.
        matrix: Its scores.
    """
    base = getattr(model.config, "_name_or_path", "") or "a model given in memory"
    tags = ["hbat", "trl", *config.objective_names, *(["peft"] if hasattr(model, "peft_config") else [])]
    ewc = "none" if config.ewc is None else json.dumps({k: v for k, v in vars(config.ewc).items() if v is not None})
    text = f"""---
library_name: transformers
tags: {json.dumps(tags)}
---

# {Path(config.output_dir).name}

Trained from `{base}` by hybrid alignment training ([HBAT](https://arxiv.org/abs/2406.15178)): the objectives
{", ".join(config.objective_names)} alternate over {config.num_rounds} rounds.

* elastic weight consolidation: `{ewc}`
* optimizer moments between stages: `{config.optimizer_state}`
* learning-rate schedule: `{config.lr_schedule}`; average: `{config.average}`
"""
    if matrix.rows:
        text += f"""
## Scores after each stage

Lower is better. The reference policy of a preference score is the model at the start of the run.

{markdown_table(matrix)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
