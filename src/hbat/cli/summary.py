"""What `hbat train` and `hbat validate` print: the scores and the plan of a run."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hbat.engines.processes import is_main_process
from hbat.reports.matrix import directions, table_rows
from hbat.reports.scores import SCORES_FILE
from hbat.trainer import HBATTrainer


def print_result(trainer: HBATTrainer) -> None:
    """Print the scores after every stage and the paths of the results, on the main process."""
    if not is_main_process():
        return
    console, matrix = Console(soft_wrap=True), trainer.matrix
    folder = Path(trainer.args.output_dir).absolute()
    if matrix.rows:
        head, (*rows, transfer) = table_rows(matrix)
        table = _table(*head)
        table.title = f"Objectives after each stage ({directions(matrix)})"
        for cells in rows:
            table.add_row(*cells)
        table.add_section()
        table.add_row(*transfer)
        console.print(table)
        if (folder / SCORES_FILE).is_file():  # not where all rows are of the run that was continued
            console.print(f"Scores: {folder / SCORES_FILE}", highlight=False)
    console.print(f"Model:  {folder}", highlight=False)


def print_plan(trainer: HBATTrainer) -> None:
    """Print what a run would train, on the main process."""
    if not is_main_process():
        return
    console, rounds = Console(soft_wrap=True), trainer.args.num_rounds
    names = trainer.args.objective_names
    table = _table("objective", "stages", "rows", "rows per stage", "steps per stage", "evaluation rows")
    total = 0
    for name in names:
        rows = len(trainer.train_dataset[name])
        steps = trainer.estimated_steps(name)
        total += steps * rounds
        part = f"{rows // rounds}" if rows % rounds == 0 else f"{rows // rounds}-{rows // rounds + 1}"
        table.add_row(name, f"{rounds}", f"{rows}", part, f"{steps}", f"{len(trainer.eval_dataset.get(name) or [])}")
    console.print(table)
    if trainer.continued is not None:
        console.print(f"{trainer.continued}\n", highlight=False)
    parameters = list(trainer.model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    console.print(
        f"{rounds} rounds of {', '.join(names)}: {rounds * len(names)} stages, about {total} optimizer steps. "
        f"{trainable:,} of {sum(parameter.numel() for parameter in parameters):,} parameters are trainable.\n"
        "The run can start: configuration, data and model are valid. Nothing was written.",
        highlight=False,
    )


def end_processes() -> None:
    """Destroy the process group, so that torchrun reports no lost rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _table(*columns: str) -> Table:
    table = Table(title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
