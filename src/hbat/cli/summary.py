"""What `hbat train` and `hbat validate` print: the scores and the plan of a run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.text import Text

from hbat.cli.output import Output, number_table
from hbat.engines.processes import is_main_process
from hbat.model.merge import Merged
from hbat.reports.files import FRONT_FILE, FRONT_PLOT_FILE, REPORT_FILE, SCORES_FILE
from hbat.reports.front import Front
from hbat.reports.matrix import directions, headline_cells, headline_columns, table_rows
from hbat.reports.plots import can_draw
from hbat.state.folder import RunFolder
from hbat.state.plan import plan
from hbat.trainer import HBATTrainer


def print_result(trainer: HBATTrainer) -> None:
    """Print the scores after every stage and the paths of the results, on the main process."""
    if not is_main_process():
        return
    output, matrix = Output(), trainer.matrix
    folder = Path(trainer.args.output_dir).absolute()
    if matrix.scored:
        head, (*rows, transfer, forgetting) = table_rows(matrix)
        table = number_table(*head)
        for cells in rows:
            table.add_row(*cells)
        table.add_section()
        table.add_row(*transfer)
        table.add_row(*forgetting)
        output.table(table, f"Objectives after each stage ({directions(matrix)})")
        if (folder / SCORES_FILE).is_file():  # not where all rows are of the run that was continued
            output.print(f"Scores: {folder / SCORES_FILE}")
    if (folder / REPORT_FILE).is_file():
        output.print(f"Report: {folder / REPORT_FILE}")
    output.print(f"Model:  {folder}")
    size = RunFolder(folder).size() / 1e6
    output.print(f"State:  {size:.1f} MB there for `hbat front` and `continue_from`; `hbat clean` removes it.")


def print_front(trainer: HBATTrainer, front: Front, saved: Path | None) -> None:
    """Print the scores along the last stage and the paths of the results, on the main process."""
    if not is_main_process():
        return
    output, folder = Output(), Path(trainer.args.output_dir).absolute()
    table = number_table("end_weight", *headline_columns(front))
    for row in front.rows:
        table.add_row(f"{row['end_weight']:g}", *headline_cells(front, row["scores"]))
    output.table(table, f"From the start (0) to the end (1) of the last stage ({directions(front)})")
    output.print(f"Scores: {folder / FRONT_FILE}")
    if can_draw():
        output.print(f"Plot:   {folder / FRONT_PLOT_FILE}")
    if saved is not None:
        output.print(f"Model:  {saved.absolute()}")


def describe_merged(merged: Merged, folder: Path, *, quantized: bool) -> str:
    """Say what an adapter was merged into, how exact that is, and where the model lies."""
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    lines = [f"Base:   {merged.base}, in {merged.dtype}"]
    if quantized:
        lines.append(f"        The adapter was trained on it in 4 or 8 bits: in {merged.dtype} its logits are others.")
    far = f"{merged.difference:.1g} of their size from the adapter's, which are {merged.effect:.1g} from the base's"
    lines.append(f"Logits: {far}")
    if merged.difference > merged.effect / 2:
        lines.append(f"        Rounding to {merged.dtype} weighs as much as the adapter: try `--dtype float32`.")
    where = f"Model:  {folder.absolute()} ({size:,.1f} MB, {merged.parameters:,} parameters in {merged.dtype})"
    return "\n".join([*lines, where])


def print_plan(trainer: HBATTrainer) -> None:
    """Print what a run would train, on the main process."""
    if not is_main_process():
        return
    output, rounds = Output(), trainer.args.num_rounds
    names = trainer.args.objective_names
    table = number_table("objective", "stages", "rows", "rows per stage", "steps per stage", "evaluation rows")
    total, stages = 0, plan(rounds, names, shares=trainer.args.shares)
    for name in names:
        track, parts = trainer.tracks[name], [stage.part for stage in stages if stage.objective == name]
        rows = [track.part_size(rounds, part) for part in parts]
        steps = [track.estimated_steps(rounds, part) for part in parts]
        total += sum(steps)
        evaluated = len(trainer.eval_dataset.get(name) or [])
        table.add_row(
            name, f"{len(parts)}", f"{len(track.train_dataset)}", _span(rows), _span(steps), f"{evaluated}"
        )  # fmt: skip
    output.table(table)
    print_lengths(output, trainer)
    print_rows(output, trainer)
    if trainer.continued is not None:
        output.print(f"{trainer.continued}\n")
    parameters = list(trainer.model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    output.print(
        f"{rounds} {'round' if rounds == 1 else 'rounds'} of {', '.join(names)}: {len(stages)} stages, "
        f"about {total} optimizer steps. "
        f"{trainable:,} of {sum(parameter.numel() for parameter in parameters):,} parameters are trainable.\n"
        "The run can start: configuration, data and model are valid. Nothing was written.",
    )


def print_lengths(output: Output, trainer: HBATTrainer) -> None:
    """Print how long rows are, and what `max_length` does to them."""
    measured = trainer.row_lengths()
    if not measured:
        return
    table = number_table("rows", "median", "95 %", "longest", "max_length", "cut", "dropped")
    for found in measured:
        limit = "" if found.limit is None else f"{found.limit}"
        counts = ("" if count is None else f"{count}" for count in (found.cut, found.dropped))
        table.add_row(found.name, f"{found.median}", f"{found.most}", f"{found.longest}", limit, *counts)
    output.table(table, "Tokens per row")


def print_rows(output: Output, trainer: HBATTrainer) -> None:
    """Print the first row of every objective, with what is learned of it between « and »."""
    for shown in trainer.shown_rows():
        text = Text(f"{shown.name} (learned: «»)\n", style="bold")
        for piece, learned in shown.pieces:
            text.append(f"«{piece}»" if learned else piece, style="green" if learned else "default")
        output.print(text, "\n", sep="")


def _span(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def end_processes() -> None:
    """Destroy the process group, so that torchrun reports no lost rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
