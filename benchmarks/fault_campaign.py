"""Faults: runs that are killed at random moments and go on, and runs that meet other faults.

Every killed run is resumed, and killed again, until it is done; its weights, critic, importance, moments, forgetting
matrix and log must equal those of the same run that nobody interrupted, to the last bit.

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

#: Configurations of a quick campaign: few, because each is also trained without a kill.
QUICK = (
    Case("sft+dpo", "full", checkpoints="in stages", evaluates_all=False),
    Case("sft+ppo", "lora", method="proximal", granularity="tensor", evaluates_all=False),
)


def killed(number: int, case: Case, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Kill one run until it is done.

    Args:
        number: Its number in the campaign.
        case: Its configuration.
        seed: The campaign's seed.
        folder: The campaign's folder.

    Yields:
        What became of it.
    """
    report = killed_runs.kill_and_resume(number, case, seed, folder / f"{number:03d}")
    print(line(report), flush=True)
    yield report.as_dict()


def killed_in_turn(case: Case, numbers: range, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Kill several runs of one configuration, which is trained without a kill only once.

    Args:
        case: The configuration.
        numbers: Their numbers in the campaign.
        seed: The campaign's seed.
        folder: The campaign's folder.

    Yields:
        What became of each.
    """
    room = folder / f"whole-{numbers[0]}"
    room.mkdir()
    whole = killed_runs.attempt(case, room / "run", resume=False)
    for number in numbers:
        report = killed_runs.kill_and_resume(number, case, seed, folder / f"{number:03d}", most_kills=1, whole=whole)
        print(line(report), flush=True)
        yield report.as_dict()


def line(report: killed_runs.Report) -> str:
    """Say what became of a run.

    Args:
        report: The run.

    Returns:
        One line, and more where its end is wrong.
    """
    kills = ", ".join(f"{each['kind']} in {each['phase']}" for each in report.kills)
    end = "bit-identical" if report.identical else "WRONG"
    shown = f"{report.number:3d}  {report.case}: {end}, killed {len(report.kills)} x ({kills})"
    return "\n     ".join([shown, *report.wrong[:5]])


def other_faults(case: Case, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Let runs of one configuration meet the other faults.

    Args:
        case: The configuration.
        seed: The campaign's seed.
        folder: A folder that is not there yet.

    Yields:
        What became of each fault.
    """
    for row in fault_rows.rows_of(case, folder, seed):
        values = {"left_out": row} if isinstance(row, str) else asdict(row)
        if isinstance(row, str) or not row.good:
            print(values, flush=True)
        yield values


def campaign_table(reports: list[dict[str, Any]]) -> list[str]:
    """Lay the killed runs out as a Markdown table.

    Args:
        reports: What became of each.

    Returns:
        Its lines.
    """
    lines = ["| factor | level | runs | kills | resumes | bit-identical |", "|---|---|---:|---:|---:|---:|"]
    for (factor, level), row in tally(reports).items():
        counts = f"{row['runs']} | {row['kills']} | {row['resumes']} | {row['identical']} of {row['runs']}"
        lines.append(f"| {factor.replace('_', ' ')} | {level} | {counts} |")
    kills = sum(len(each["kills"]) for each in reports)
    resumes = sum(each["resumes"] for each in reports)
    good = sum(each["identical"] for each in reports)
    return [*lines, f"| all | | {len(reports)} | {kills} | {resumes} | **{good} of {len(reports)}** |"]


def moments_table(reports: list[dict[str, Any]]) -> list[str]:
    """Lay out where the kills fell as a Markdown table.

    Args:
        reports: What became of each run.

    Returns:
        Its lines.
    """
    kinds = ("time", "operation", "empty", "torn")
    counts = Counter((kill["phase"], kill["kind"]) for each in reports for kill in each["kills"])
    lines = ["| what the run was doing | " + " | ".join(kinds) + " | all |", "|---|" + "---:|" * 5]
    for phase in PHASES:
        numbers = [counts[phase, kind] for kind in kinds]
        lines.append(f"| {phase} | " + " | ".join(map(str, [*numbers, sum(numbers)])) + " |")
    return lines


def damage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out what became of damaged files as a Markdown table.

    Args:
        rows: What became of each fault.

    Returns:
        Its lines.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for each in rows:
        damage, _, kind = each["fault"].partition(": ")
        if kind:
            found.setdefault(kind, {}).setdefault(damage, set()).add(each["outcome"])
    lines = ["| file | " + " | ".join(DAMAGES) + " |", "|---|" + "---|" * len(DAMAGES)]
    for kind, cells in sorted(found.items()):
        lines.append(f"| {kind} | " + " | ".join("; ".join(sorted(cells.get(each, ()))) for each in DAMAGES) + " |")
    return lines


def rows_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out what became of the faults that are no damaged files as a Markdown table.

    Args:
        rows: What became of each fault.

    Returns:
        Its lines.
    """
    counts = Counter((each["fault"], each["outcome"], each["good"]) for each in rows if ": " not in each["fault"])
    lines = ["| fault | what happened | runs | as it should |", "|---|---|---:|---|"]
    for (fault, outcome, good), count in sorted(counts.items()):
        lines.append(f"| {fault} | {outcome} | {count} | {'yes' if good else '**no**'} |")
    return lines


def document(given: argparse.Namespace, reports: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Write the results down.

    Args:
        given: The command's options.
        reports: What became of the killed runs.
        rows: What became of the other faults.

    Returns:
        Markdown.
    """
    faults = [each for each in rows if "left_out" not in each]
    versions = ", ".join(f"{name} {version}" for name, version in about().items() if name != "threads")
    parts = [
        "# Faults",
        (
            f"Made by `python benchmarks/fault_campaign.py --seed {given.seed} --runs {given.runs}` (`make faults`), "
            f"with {versions}."
        ),
        "## Killed runs",
        (
            "Tiny models, two rounds, evaluation after every stage. Each run is killed at one to four random moments "
            "and resumed in a new process each time. It counts as bit-identical if weights, critic, accumulated "
            "importance, optimizer moments, forgetting matrix, log (without times and TRL's count of tokens) and the "
            "names of all files are those of the same run without a kill. Fisher is drawn for SFT and DPO only: the "
            "online objectives have no sequences to compute it from."
        ),
        "\n".join(campaign_table(reports)),
        (
            "Where the kills fell. `time`: SIGKILL from outside after a random time; `operation`: SIGKILL right "
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
            "Each run meets the fault, then is resumed without it. The full disks are small file systems in memory "
            "that run out of room at up to seven different points, in the run's own files and in transformers' files."
        ),
        "\n".join(rows_table(faults)),
        *(f"{each['left_out']}." for each in rows if "left_out" in each),
        "## Damaged files",
        (
            "A run is killed in its last stage, one file is damaged, and the run is resumed. *Identical*: it ended "
            "bit for bit as it should; *warned*: the log names the damaged file."
        ),
        "\n".join(damage_table(faults)),
    ]
    return "\n\n".join(parts) + "\n"


def planned(given: argparse.Namespace, folder: Path) -> list[Callable[[], Iterator[dict[str, Any]]]]:
    """Plan the runs that are killed.

    Args:
        given: The command's options.
        folder: The campaign's folder.

    Returns:
        What to do, in pieces that need nothing of each other.
    """
    if given.quick:
        numbers = (range(index, given.runs, len(QUICK)) for index in range(len(QUICK)))
        pairs = [(case, each) for case, each in zip(QUICK, numbers, strict=True) if each]
        return [partial(killed_in_turn, case, each, given.seed, folder) for case, each in pairs]
    cases = enumerate(draw_cases(given.runs, given.seed))
    chosen = [(number, case) for number, case in cases if given.only in {None, number}]
    return [partial(killed, number, case, given.seed, folder) for number, case in chosen]


def options() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The command's options.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="Seed of configurations and moments.")
    parser.add_argument("--runs", type=int, default=50, help="Number of runs that are killed.")
    parser.add_argument("--workers", type=int, default=2, help="Processes at a time.")
    parser.add_argument("--only", type=int, help="Number of the one run to do.")
    parser.add_argument("--quick", action="store_true", help="Two small configurations, and no other faults.")
    parser.add_argument("--markdown", type=Path, help="File for the tables.")
    return parser.parse_args()


def main() -> int:
    """Run the campaign and print its tables.

    Returns:
        Status: 1 where anything ended as it should not.
    """
    given, begun = options(), time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="hbat-faults-"))
    reports = killed_runs.in_parallel(planned(given, folder), given.workers, folder)
    reports.sort(key=lambda each: each["number"])
    rows: list[dict[str, Any]] = []
    if not given.quick and given.only is None:
        rooms = [(case, folder / f"rows-{index}") for index, case in enumerate(fault_rows.CASES)]
        tasks = [partial(other_faults, case, given.seed, room) for case, room in rooms]
        rows = killed_runs.in_parallel(tasks, given.workers, folder)
        save("faults", {"seed": given.seed, "seconds": time.perf_counter() - begun, "runs": reports, "rows": rows})
    text = document(given, reports, rows)
    print(text)
    if given.markdown is not None:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(text, encoding="utf-8")
    wrong = [each for each in reports if not each["identical"]] + [each for each in rows if not each.get("good", True)]
    for each in wrong:
        print(f"WRONG: {each}")
    if wrong:
        again = "--quick" if given.quick else "--only NUMBER"
        print(
            f"What is left of these runs lies in {folder}; `--seed {given.seed} --runs {given.runs} {again}` repeats."
        )
    else:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
