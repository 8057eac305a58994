"""Fault injection: runs that are killed at random moments and resumed, and runs that meet other faults.

Every killed run is resumed, and killed again, until it is done. Its weights, critic, importance, moments, forgetting
matrix and log must be bit-identical to those of the same run without interruption.

    python benchmarks/fault_campaign.py [--seed 1] [--runs 50] [--only NUMBER] [--quick] [--markdown FILE]
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fault_rows
import killed_runs
from faults import DAMAGES
from kill_plan import PHASES, Case, draw_cases, tally
from workload import about, save

#: Configurations of a quick campaign: few, because each is also trained without kills.
QUICK = (
    Case("sft+dpo", "full", checkpoints="in stages", evaluates_all=False),
    Case("sft+ppo", "lora", method="proximal", granularity="tensor", evaluates_all=False),
)


def killed(number: int, case: Case, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Kill and resume one run until it is done; yields its report."""
    report = killed_runs.kill_and_resume(number, case, seed, folder / f"{number:03d}")
    print(line(report), flush=True)
    yield report.as_dict()


def killed_in_turn(case: Case, numbers: range, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Kill and resume several runs of one configuration, with one uninterrupted run to compare with."""
    uninterrupted = folder / f"whole-{numbers[0]}"
    uninterrupted.mkdir()
    whole = killed_runs.attempt(case, uninterrupted / "run", resume=False)
    for number in numbers:
        report = killed_runs.kill_and_resume(number, case, seed, folder / f"{number:03d}", most_kills=1, whole=whole)
        print(line(report), flush=True)
        yield report.as_dict()


def line(report: killed_runs.Report) -> str:
    """Format a report; more than one line if the result is wrong."""
    kills = ", ".join(f"{kill['kind']} in {kill['phase']}" for kill in report.kills)
    result = "bit-identical" if report.identical else "WRONG"
    shown = f"{report.number:3d}  {report.case}: {result}, killed {len(report.kills)} x ({kills})"
    return "\n     ".join([shown, *report.wrong[:5]])


def other_faults(case: Case, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Inject the other faults into runs of one configuration; yields a row per fault."""
    for row in fault_rows.rows_of(case, folder, seed):
        values = {"skipped": row} if isinstance(row, str) else asdict(row)
        if isinstance(row, str) or not row.good:
            print(values, flush=True)
        yield values


def campaign_table(reports: list[dict[str, Any]]) -> list[str]:
    """Markdown table of the killed runs."""
    lines = ["| factor | level | runs | kills | resumes | bit-identical |", "|---|---|---:|---:|---:|---:|"]
    for (factor, level), row in tally(reports).items():
        counts = f"{row['runs']} | {row['kills']} | {row['resumes']} | {row['identical']} of {row['runs']}"
        lines.append(f"| {factor.replace('_', ' ')} | {level} | {counts} |")
    kills = sum(len(report["kills"]) for report in reports)
    resumes = sum(report["resumes"] for report in reports)
    good = sum(report["identical"] for report in reports)
    return [*lines, f"| all | | {len(reports)} | {kills} | {resumes} | **{good} of {len(reports)}** |"]


def moments_table(reports: list[dict[str, Any]]) -> list[str]:
    """Markdown table of the moments of the kills."""
    kinds = ("time", "operation", "empty", "torn")
    counts = Counter((kill["phase"], kill["kind"]) for report in reports for kill in report["kills"])
    lines = ["| activity of the run | " + " | ".join(kinds) + " | all |", "|---|" + "---:|" * 5]
    for phase in PHASES:
        numbers = [counts[phase, kind] for kind in kinds]
        lines.append(f"| {phase} | " + " | ".join(map(str, [*numbers, sum(numbers)])) + " |")
    return lines


def damage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown table of the outcomes of damaged files."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        damage, _, kind = row["fault"].partition(": ")
        if kind:
            found.setdefault(kind, {}).setdefault(damage, set()).add(row["outcome"])
    lines = ["| file | " + " | ".join(DAMAGES) + " |", "|---|" + "---|" * len(DAMAGES)]
    for kind, cells in sorted(found.items()):
        lines.append(
            f"| {kind} | " + " | ".join("; ".join(sorted(cells.get(damage, ()))) for damage in DAMAGES) + " |"
        )
    return lines


def rows_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown table of the outcomes of the other faults."""
    counts = Counter((row["fault"], row["outcome"], row["good"]) for row in rows if ": " not in row["fault"])
    lines = ["| fault | outcome | runs | as expected |", "|---|---|---:|---|"]
    for (fault, outcome, good), count in sorted(counts.items()):
        lines.append(f"| {fault} | {outcome} | {count} | {'yes' if good else '**no**'} |")
    return lines


def document(given: argparse.Namespace, reports: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    faults = [row for row in rows if "skipped" not in row]
    versions = ", ".join(f"{name} {version}" for name, version in about().items() if name != "threads")
    parts = [
        "# Faults",
        (
            f"Generated by `python benchmarks/fault_campaign.py --seed {given.seed} --runs {given.runs}` "
            f"(`make faults`) with {versions}."
        ),
        "## Killed runs",
        (
            "Tiny models, two rounds, evaluation after every stage. Each run is killed at one to four random moments "
            "and resumed in a new process each time. It counts as bit-identical if weights, critic, accumulated "
            "importance, optimizer moments, forgetting matrix, log (without times and TRL's token count) and the "
            "names of all files equal those of the same run without kills. The Fisher information is drawn for SFT "
            "and DPO only: the online objectives have no sequences to compute it from."
        ),
        "\n".join(campaign_table(reports)),
        (
            "The moments of the kills. `time`: SIGKILL from outside after a random time; `operation`: SIGKILL right "
            "before a random operation on the run's files; `empty`: right after a file was opened for writing; "
            "`torn`: the kernel ends the process in the middle of a write."
        ),
        "\n".join(moments_table(reports)),
    ]
    if not rows:
        return "\n\n".join(parts) + "\n"
    parts += [
        "## Other faults",
        (
            "Each run meets the fault, then resumes without it. The full disks are small in-memory file systems that "
            "run out of space at up to seven different points, in files of hbat and of transformers."
        ),
        "\n".join(rows_table(faults)),
        *(f"{row['skipped']}." for row in rows if "skipped" in row),
        "## Damaged files",
        (
            "A run is killed in its last stage, one file is damaged, and the run resumes. *Identical*: the result is "
            "bit-identical; *warned*: the log names the damaged file."
        ),
        "\n".join(damage_table(faults)),
    ]
    return "\n\n".join(parts) + "\n"


def planned(given: argparse.Namespace, folder: Path) -> list[Callable[[], Iterator[dict[str, Any]]]]:
    """The runs to kill, as independent tasks."""
    if given.quick:
        numbers = (range(index, given.runs, len(QUICK)) for index in range(len(QUICK)))
        pairs = [(case, some) for case, some in zip(QUICK, numbers, strict=True) if some]
        return [partial(killed_in_turn, case, some, given.seed, folder) for case, some in pairs]
    cases = enumerate(draw_cases(given.runs, given.seed))
    chosen = [(number, case) for number, case in cases if given.only in {None, number}]
    return [partial(killed, number, case, given.seed, folder) for number, case in chosen]


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="Seed of the configurations and moments.")
    parser.add_argument("--runs", type=int, default=50, help="Number of runs to kill.")
    parser.add_argument("--workers", type=int, default=2, help="Number of parallel processes.")
    parser.add_argument("--only", type=int, help="Index of a single run.")
    parser.add_argument("--quick", action="store_true", help="Two small configurations, no other faults.")
    parser.add_argument("--markdown", type=Path, help="Output file of the tables.")
    return parser.parse_args()


def main() -> int:
    """Run the campaign, print its tables, and return status 1 if any result is wrong."""
    given, start = options(), time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="hbat-faults-"))
    reports = killed_runs.in_parallel(planned(given, folder), given.workers, folder)
    reports.sort(key=lambda report: report["number"])
    rows: list[dict[str, Any]] = []
    if not given.quick and given.only is None:
        rooms = [(case, folder / f"rows-{index}") for index, case in enumerate(fault_rows.CASES)]
        tasks = [partial(other_faults, case, given.seed, room) for case, room in rooms]
        rows = killed_runs.in_parallel(tasks, given.workers, folder)
        save("faults", {"seed": given.seed, "seconds": time.perf_counter() - start, "runs": reports, "rows": rows})
    text = document(given, reports, rows)
    print(text)
    if given.markdown is not None:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(text, encoding="utf-8")
    wrong = [row for row in [*reports, *rows] if not row.get("identical", row.get("good", True))]
    for row in wrong:
        print(f"WRONG: {row}")
    if wrong:
        again = "--quick" if given.quick else "--only NUMBER"
        print(f"Their files are in {folder}; repeat them with `--seed {given.seed} --runs {given.runs} {again}`.")
    else:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
