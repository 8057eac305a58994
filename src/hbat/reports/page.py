"""`report.html`: one page that shows a run. It loads nothing from anywhere."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from hbat.reports import plots
from hbat.reports.costs import BESIDE, duration, steps_done, tokens_per_second
from hbat.reports.files import REPORT_FILE
from hbat.reports.matrix import ForgettingMatrix, directions
from hbat.reports.record import RunRecord
from hbat.state.files import write_bytes

logger = logging.getLogger(__name__)

#: Scores beside the headline that say what a loss does not.
_TELLING = ("rewards/accuracies", "rewards/margins")
#: Curves beside the losses, where an objective logs them.
_CURVES = ("rewards/accuracies", "reward")


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes:
        text: The number.
        bad: How near it is to the worst of its column, from 0 to 1; None without a colour.
        interval: Its 95 % interval, if it is known.
    """

    text: str
    bad: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its SVG, and what stands below it, which is its text for those who do not see it, too."""

    title: str
    caption: str
    svg: Markup


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder, and return its path.

    Raises:
        RunStateError: If the folder holds no run.
    """
    record, file = RunRecord.read(folder), folder / REPORT_FILE
    write_bytes(file, render(record).encode())
    return file


def try_report(folder: Path) -> None:
    """Write the page; where that fails, the log says so: what was trained is worth more than a picture of it."""
    try:
        write_report(folder)
    except Exception as error:  # noqa: BLE001 - of any library that draws
        logger.warning("%s could not be written: %r. Everything else is saved.", folder / REPORT_FILE, error)


def render(record: RunRecord) -> str:
    """Write the page of a run as HTML."""
    matrix, state = record.matrix, record.state
    done, planned = len(record.stages_done), len(state.plan)
    return template("run.html").render(
        title=record.folder.resolve().name,
        sentence=sentence(record),
        unfinished=f"{done} of {planned} stages are done." if done < planned else "",
        evaluated=matrix.counts,
        scores=list(score_rows(matrix)),
        score_columns=[(*place, arrow(matrix, *place)) for place in score_columns(matrix)],
        referenced=any(_is_of_reference(metric) for _, metric in score_columns(matrix)),
        transfer=_signed(matrix, matrix.backward_transfer()),
        forgetting=_signed(matrix, matrix.forgetting()),
        pictures=list(pictures(record)) if plots.can_draw() else [],
        can_draw=plots.can_draw(),
        completions=completions(record),
        costs=list(cost_rows(record)),
        data=state.fingerprint.get("data", {}),
        values=settings(record),
        run_file=record.run_file,
        versions=state.versions,
    )


def template(name: str) -> Template:
    """Read a template of a page."""
    loader = PackageLoader("hbat.reports")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def sentence(record: RunRecord) -> str:
    """Say in a sentence what a run trains on what, and how."""
    run, ewc = record.state.fingerprint["run"], record.state.fingerprint["ewc"]
    rows = record.state.fingerprint.get("data", {})
    parts = [f"{name} ({rows[name]['rows']} rows)" if name in rows else name for name in run["objectives"]]
    rounds = "one round" if run["num_rounds"] == 1 else f"{run['num_rounds']} rounds"
    held = "without a penalty" if ewc is None else f"held back by EWC ({ewc['source']}, strength {ewc['strength']:g})"
    model = record.state.model
    return f"{f'{model}: ' if model else ''}{', then '.join(parts)}, in {rounds}, {held}."


def arrow(matrix: ForgettingMatrix, name: str, metric: str) -> str:
    """Say which scores of a column are better."""
    return "\u2191" if is_higher_better(matrix, name, metric) else "\u2193"


def score_columns(matrix: ForgettingMatrix) -> list[tuple[str, str]]:
    """Objective and metric of every column of scores: the headline of each, and what says more than it."""
    columns = []
    for name in matrix.scored:
        headline = matrix.headline[name]
        logged = {metric for row in matrix.rows for metric in row["scores"].get(name, {})}
        columns += [(name, metric) for metric in dict.fromkeys((headline, *_TELLING)) if metric in logged]
    return columns


def score_rows(matrix: ForgettingMatrix) -> Iterator[tuple[str, list[Cell]]]:
    """Label and cells of every row of the forgetting matrix."""
    columns = [_cells(matrix, name, metric) for name, metric in score_columns(matrix)]
    for index, (label, _) in enumerate(matrix.lines()):
        yield label, [column[index] for column in columns]


def _cells(matrix: ForgettingMatrix, name: str, metric: str) -> list[Cell]:
    values = matrix.series(name, metric)
    # The model at the first start is the reference policy.
    starts = [
        _is_of_reference(metric) and index == 0 and row["objective"] is None for index, row in enumerate(matrix.rows)
    ]
    known = [None if start else value for start, value in zip(starts, values, strict=True)]
    cells = column(
        known, [matrix.counts.get(name)] * len(values), metric, higher=is_higher_better(matrix, name, metric)
    )
    return [
        Cell("reference") if start and value is not None else cell
        for start, value, cell in zip(starts, values, cells, strict=True)
    ]


def _is_of_reference(metric: str) -> bool:
    """Whether a metric compares with the reference policy."""
    return metric.startswith("rewards/")


def is_higher_better(matrix: ForgettingMatrix, name: str, metric: str) -> bool:
    """Whether a higher score is better; of those beside the headline it is."""
    return metric != matrix.headline[name] or matrix.better_of(name) == "higher"


def column(values: Sequence[float | None], counts: Sequence[int | None], metric: str, *, higher: bool) -> list[Cell]:
    """Cells of a column of scores, each with the number of rows that it was measured on."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    best, worst = (min(known), max(known)) if known else (0.0, 0.0)
    if higher:
        best, worst = worst, best
    cells = []
    for value, count in zip(values, counts, strict=True):
        if value is None:
            cells.append(Cell("not evaluated"))
            continue
        bad = (value - best) / (worst - best) if worst != best and math.isfinite(value) else None
        cells.append(
            Cell(f"{value:.4f}", bad, _interval(value, count) if count and metric.endswith("accuracies") else "")
        )
    return cells


def _interval(share: float, count: int) -> str:
    """Wilson's 95 % interval of a share of so many rows."""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return f"[{max(0.0, middle - half):.2f}, {min(1.0, middle + half):.2f}]"


def _signed(matrix: ForgettingMatrix, values: Mapping[str, float]) -> list[str]:
    return [
        f"{values[name]:+.4f}" if metric == matrix.headline[name] and name in values else ""
        for name, metric in score_columns(matrix)
    ]


def pictures(record: RunRecord) -> Iterator[Picture]:
    """Draw what there is to draw."""
    matrix, log, names = record.matrix, record.log, record.state.fingerprint["run"]["objectives"]
    spans = record.spans()
    keys = [f"{name}/{what}" for name in names for what in ("loss", *_CURVES)]
    keys = [key for key in keys if any(key in entry for entry in log)]
    if spans and keys:
        yield picture(
            "Training", "What the stages logged while they trained, each shaded in the colour of its objective.",
            plots.curves_figure(log, keys, spans),
        )  # fmt: skip
    ratios = [key for name in names if any((key := f"{name}/ewc/grad_norm_ratio") in entry for entry in log)]
    if spans and ratios:
        yield picture(
            "Penalty against task",
            "Norm of the penalty's gradient over the task's. With a mean below 0.02 the penalty does nothing, above 3 "
            "it leaves nothing else.",
            plots.curves_figure(log, ratios, spans),
        )
    if matrix.scored:
        yield picture(
            "Scores over the stages",
            f"Every objective after every stage; {directions(matrix)}.",
            plots.score_figure(matrix),
        )
    if len(traded := matrix.traded(matrix.scored)) > 1:
        labels = [label.replace("round ", "") for label, _ in matrix.lines()]
        caption = "Objective against objective: where the run was after each stage (grey)"
        caption += ", and the line between the last stage's start and end." if record.front else "."
        yield picture("Trade-off", caption, plots.trade_off_figure(matrix, record.front, labels, traded))
    if any("/ewc/measured" in key for entry in log for key in entry):
        yield picture(
            "Predicted and measured forgetting",
            "By how much a stage raised the other objectives' losses: as its penalty had it, and as evaluation has "
            "it. On the dashed line both agree.",
            plots.increases_figure(log, names),
        )
    if record.costs:
        done = [stage for stage in record.stages_done if stage.index in record.costs]
        labels, costs = (
            [f"{stage.round}: {stage.objective}" for stage in done],
            [record.costs[at.index] for at in done],
        )
        caption = "Seconds of every stage, without those of evaluations between stages."
        yield picture("Time of the stages", caption, plots.costs_figure(costs, labels))
    if shares := record.importance():
        source = (record.state.fingerprint["ewc"] or {}).get("source", "path")
        what = {"path": "path integral", "fisher": "Fisher information"}.get(source, "importance")
        yield picture(
            "Importance",
            "In which layer and module the parameters lie that later stages of other objectives are kept from moving: "
            f"share of an objective's {what}.",
            plots.importance_figure(shares),
        )


def picture(title: str, caption: str, figure: Any) -> Picture:
    """Make a picture of a figure."""
    return Picture(title, caption, Markup(plots.as_svg(figure)))  # noqa: S704 - drawn here, its texts escaped


def completions(record: RunRecord) -> list[dict[str, Any]]:
    """The completions of every prompt, by stage in order."""
    labels = {stage.index: f"round {stage.round}: {stage.objective}" for stage in record.state.plan}
    found: dict[str, dict[str, Any]] = {}
    for row in record.completions:
        prompt = found.setdefault(
            json.dumps(row["prompt"], default=str), {"prompt": _turns(row["prompt"]), "texts": []}
        )
        note = f"{row['tokens']} tokens" + ("" if row["ended"] else ", cut off")
        prompt["texts"].append({
            "label": labels.get(row["stage"], "start"), "text": row["completion"], "note": note
        })  # fmt: skip
    return list(found.values())


def _turns(prompt: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in prompt]


def cost_rows(record: RunRecord) -> Iterator[list[str]]:
    """Cells of the table of costs: stages, the evaluations after them, and their sum."""
    labels = {stage.index: f"round {stage.round}: {stage.objective}" for stage in record.state.plan}
    for cost in record.state.costs:
        place, seconds = labels.get(cost["stage"], "the start"), cost["seconds"]
        if "objective" not in cost:
            yield [f"evaluation after {place}", "", duration(seconds), "", f"{cost['peak_gib']:.2f}", "", "", ""]
            continue
        rate = tokens_per_second(cost)
        yield [
            place, steps_done(cost), duration(seconds), "not counted" if rate is None else f"{rate:,.0f}",
            f"{cost['peak_gib']:.2f}",
            *(f"{100 * cost.get(what, 0.0) / max(seconds, 1e-9):.1f} %" for what in BESIDE),
        ]  # fmt: skip
    if record.state.costs:
        whole = sum(cost["seconds"] for cost in record.state.costs)
        yield ["all", "", duration(whole), "", "", "", "", ""]


def settings(record: RunRecord, *, everything: bool = False) -> dict[str, str]:
    """What the run was configured with: its own values, and of the sections those that were set.

    With `everything` also defaults, and what is recorded of data, model and tokenizer.
    """
    found: dict[str, str] = {}
    for section, values in record.state.fingerprint.items():
        if section in ("data", "parameters", "tokenizer") and not everything:
            continue
        given = values if everything else record.state.given.get(section, values)
        found |= _flat(section, {key: values[key] for key in values if key in given} if values else values)
    return found


def _flat(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: value if isinstance(value, str) else json.dumps(value)}
    return {key: text for inner, own in value.items() for key, text in _flat(f"{name}.{inner}", own).items()}
