"""Tables and plots of the evidence, from the runs that are done.

    python benchmarks/alignment/report.py [--output FOLDER]

Writes `report.md`, with the tables of docs/does-it-work.md first, and PNG files beside the records.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from metrics import Record, area, chosen_without_own_seed, line
from plan import RATE
from run import RESULTS
from tables import DEFAULT, HEATS, minus, tables

REFERENCE = "two-stage"
_SHOWN = (REFERENCE, "old rows", "path, old rows")  # families in a plot of fronts, beside the default


def read(folder: Path) -> list[Record]:
    """Read the records of a folder."""
    file = folder / "runs.jsonl"
    text = file.read_text() if file.exists() else gzip.decompress((folder / "runs.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def by(records: Iterable[Record], *names: str) -> dict[Any, list[Record]]:
    """Group records by fields, in order of appearance."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(record)
    return found


def mean(records: Sequence[Record], share: str, heat: str, metric: str, group: str = "all") -> float:
    """Mean of a score over runs, in percent."""
    return 100 * fmean(record["scores"][share][heat][group][metric] for record in records)


def methods_table(records: Sequence[Record]) -> str:
    """A line a method: scores of its end, its best averaging shares, the area under its front."""
    groups = list(records[0]["scores"]["1"]["T0"])[1:]
    heads = [
        "method", "n", "T0 right", "T0 style", "T0 both", "T0.75 both", "T1 right", "T1 style", "T1 both",
        "T0 both, best share", "T1 both, best share", "area T0", "area T1", *(f"T0 right, {name}" for name in groups),
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for method, runs in by(records, "method").items():
        ends = [("T0", "accuracy"), ("T0", "style"), ("T0", "both"), ("T0.75", "both"),
                ("T1", "accuracy"), ("T1", "style"), ("T1", "both")]  # fmt: skip
        cells = [f"{mean(runs, '1', heat, metric):.1f}" for heat, metric in ends]
        for heat in ("T0", "T1"):
            score, share = max((mean(runs, share, heat, "both"), share) for share in runs[0]["scores"])
            cells.append(f"{score:.1f} at {share}")
        cells += [f"{100 * fmean(area([line(run, heat)]) for run in runs):.1f}" for heat in ("T0", "T1")]
        cells += [f"{mean(runs, '1', 'T0', 'accuracy', name):.1f}" for name in groups]
        lines.append([method, str(len(runs)), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparison_table(records: Sequence[Record]) -> str:
    """Each family minus the reference: means of paired differences over seeds, with 95 % intervals."""
    families = {name: by(runs, "method") for name, runs in by(records, "family").items()}
    if REFERENCE not in families:
        return ""
    heads = ["family", "configurations", "n", *(f"{heat} both" for heat in HEATS), "area T0", "area T1"]
    lines = [heads, ["---"] * len(heads)]
    for name, methods in families.items():
        if name == REFERENCE:
            continue
        pair = (methods, families[REFERENCE])
        seeds = sorted(set.intersection(*({run["seed"] for run in next(iter(own.values()))} for own in pair)))
        whole = [_whole(own, seeds) for own in pair]
        count = min(map(len, whole))
        if not seeds or not count:
            continue
        own, other = (runs[:count] for runs in whole)
        cells = [_difference(_tuned(own, heat), _tuned(other, heat)) for heat in HEATS]
        cells += [_difference(_areas(own, heat), _areas(other, heat)) for heat in ("T0", "T1")]
        lines.append([name, str(count), str(len(seeds)), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _whole(methods: dict[str, list[Record]], seeds: Sequence[int]) -> list[dict[int, Record]]:
    # Methods with a run of every seed: a programme that was cut off leaves some without.
    found = [{run["seed"]: run for run in runs} for runs in methods.values()]
    return [{seed: runs[seed] for seed in seeds} for runs in found if runs.keys() >= set(seeds)]


def _difference(own: dict[int, float], other: dict[int, float]) -> str:
    return minus([100 * own[seed] for seed in own], [100 * other[seed] for seed in own])


def _tuned(methods: list[dict[int, Record]], heat: str) -> dict[int, float]:
    # Every averaging share of every method is a configuration.
    shares = list(next(iter(methods[0].values()))["scores"])
    return chosen_without_own_seed([
        {seed: run["scores"][share][heat]["all"]["both"] for seed, run in runs.items()}
        for runs in methods
        for share in shares
    ])


def _areas(methods: list[dict[int, Record]], heat: str) -> dict[int, float]:
    return {seed: area([line(runs[seed], heat) for runs in methods]) for seed in methods[0]}


def draw_fronts(records: Sequence[Record], file: Path) -> None:
    """Accuracy against style: a line a method, a point an averaging share, a star its end."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    found = by(records, "method")
    shown = [
        (method, runs)
        for method, runs in sorted(found.items())
        if method == DEFAULT or (runs[0]["family"] in _SHOWN and len(runs) == len(found.get(DEFAULT, runs)))
    ]
    for axis, heat in zip(figure.subplots(1, 2), ("T0.75", "T1"), strict=True):
        axis.set_prop_cycle(color=colormaps["tab20"].colors)
        for method, runs in shown:
            x, y = ([mean(runs, share, heat, what) for share in runs[0]["scores"]] for what in ("style", "accuracy"))
            style = {"color": "black", "linewidth": 2.5} if method == DEFAULT else {"linestyle": "--", "linewidth": 1}
            (drawn,) = axis.plot(x, y, marker=".", label=method, **style)
            axis.scatter(x[-1:], y[-1:], marker="*", s=90, color=drawn.get_color(), zorder=3)
        axis.set(xlabel="answers in the preferred style, %", ylabel="right answers, %", title=HEATS[heat])
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def draw_map(records: Sequence[Record], file: Path) -> None:
    """Rounds and strengths (the paper's Figure 2): answers that are right and in the preferred style."""
    cells: dict[tuple[int, float], list[Record]] = {}
    for record in records:
        ewc, rounds = record["options"].get("ewc") or {}, record["options"].get("num_rounds", 1)
        plain = not ewc and record["family"] in {REFERENCE, "alternation"}
        path = re.fullmatch(r"path( N=\d)?", record["family"]) and ewc.keys() == {"source", "strength"}
        if record["rate"] == RATE and (plain or path):
            cells.setdefault((rounds, float(ewc.get("strength", 0))), []).append(record)
    rounds, strengths = sorted({n for n, _ in cells}), sorted({strength for n, strength in cells if n > 1})
    cells = {place: runs for place, runs in cells.items() if place[1] in strengths}
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in cells.values())) if cells else set()
    cells = {place: [run for run in runs if run["seed"] in seeds] for place, runs in cells.items()}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, heat in zip(figure.subplots(1, 2), ("T0", "T1"), strict=True):
        table = [
            [mean(cells[n, f], "1", heat, "both") if (n, f) in cells else float("nan") for f in strengths]
            for n in rounds
        ]
        axis.imshow(table, aspect="auto", cmap="viridis")
        for row, column in ((row, column) for row in range(len(rounds)) for column in range(len(strengths))):
            axis.text(column, row, f"{table[row][column]:.0f}", ha="center", va="center", backgroundcolor="#ffffffb0")
        axis.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
        axis.set_yticks(range(len(rounds)), [str(n) for n in rounds])
        axis.set(xlabel="strength", ylabel="rounds", title=f"right and in style, {HEATS[heat]}, %")
    figure.savefig(file, dpi=100)


def draw_heat(records: Sequence[Record], file: Path) -> None:
    """Answers that are both, over the temperature of sampling (the paper's Figure 3)."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for method, runs in by(records, "method").items():
        heats = runs[0]["temperatures"]
        axis.plot(
            heats,
            [mean(runs, "1", f"T{heat:g}", "both") for heat in heats],
            marker="o",
            label=method.removesuffix(" temperatures"),
        )
    axis.set(xlabel="temperature", ylabel="right and in the preferred style, %")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def draw_curves(records: Sequence[Record], file: Path) -> None:
    """Scores over optimizer steps (the paper's Figure 5)."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    names = {"accuracy": "right", "style": "in style", "both": "right and in style"}
    for axis, (metric, name) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for method, runs in by(records, "method").items():
            steps = [point["step"] for point in runs[0]["curve"]]
            values = [
                [100 * run["curve"][index]["scores"]["T1"]["all"][metric] for run in runs]
                for index in range(len(steps))
            ]
            axis.plot(steps, [fmean(each) for each in values], label=method.removesuffix(" score_every"))
        axis.grid(alpha=0.3)
        axis.set(xlabel="optimizer steps", title=f"{name}, {HEATS['T1']}, %")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    folder = parser.parse_args().output
    records = read(folder)
    plain = [record for record in records if record["family"] not in {"score_every", "temperatures"}]
    main_runs = [record for record in plain if (record["regime"], record["base"]) == ("main", "small")]
    text = [f"# Evidence\n\n{len(records)} runs, {sum(record['seconds']['all'] for record in records) / 3600:.1f} h\n"]
    text += [f"## {name}\n\n{table}\n" for name, table in tables(plain)] if main_runs else []
    for (regime, base), runs in by(plain, "regime", "base").items():
        ordered = sorted(runs, key=lambda record: record["seed"])
        file = folder / f"front-{regime}-{base}.png"
        draw_fronts(ordered, file)
        text += [
            f"## {regime}, {base} base\n", methods_table(ordered), f"\nMinus {REFERENCE}, paired by seed\n",
            comparison_table(ordered), f"\n![]({file.name})\n",
        ]  # fmt: skip
    if main_runs:
        draw_map(main_runs, folder / "map.png")
    for family, draw, name in (("score_every", draw_curves, "steps"), ("temperatures", draw_heat, "temperatures")):
        if chosen := [record for record in records if record["family"] == family]:
            draw(chosen, folder / f"{name}.png")
    (folder / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(folder / "report.md")


if __name__ == "__main__":
    main()
