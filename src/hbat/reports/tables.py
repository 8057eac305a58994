"""Tables in trackers: TensorBoard, W&B and trackio."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def show_table(reporters: Iterable[TrainerCallback], name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show rows with the same keys in every reporter that has tables."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    for reporter in reporters:
        if isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
            lines = [columns, ["---"] * len(columns), *cells]
            escaped = ((cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) for line in lines)
            text = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
            reporter.tb_writer.add_text(name, text, step)
        elif isinstance(reporter, WandbCallback):
            wandb = reporter._wandb  # noqa: SLF001 - the module, which is imported when it is used
            wandb.log({name: wandb.Table(columns=columns, data=cells), "train/global_step": step})
        elif isinstance(reporter, TrackioCallback):
            trackio = reporter._trackio  # noqa: SLF001
            frame = Dataset.from_list([dict(zip(columns, line, strict=True)) for line in cells]).to_pandas()
            trackio.log({name: trackio.Table(dataframe=frame), "train/global_step": step})


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)  # a conversation
