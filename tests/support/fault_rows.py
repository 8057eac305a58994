"""Faults other than a kill: signals, a second process, damaged files, a full or read-only disk."""

import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import killed_runs
from faults import DAMAGES
from kill_plan import Case, Kill, differences
from killed_runs import attempt

CASES = (Case("sft+ppo", checkpoints="in stages"), Case("sft+dpo", "lora", checkpoints="in stages"))
#: Optimizer step, counted over stages, at which the last stage has a checkpoint and steps left to train.
LAST_STEPS = {"sft+ppo": 21, "sft+dpo": 12}


@dataclass
class Row:
    """The outcome of one fault."""

    fault: str
    case: Case
    outcome: str
    good: bool
    detail: str = ""


def _compared(outcome, whole):
    """Whether the end is identical, and what differs."""
    if outcome.end is None:
        return f"status {outcome.status}", [outcome.error[-2000:]]
    wrong = differences(outcome.end, whole.end)
    return ("identical" if not wrong else "different"), wrong


def _until_it_ends(case, run, whole, fault, expected, seen):
    """Resume a run after a fault and compare its end."""
    found, wrong = _compared(attempt(case, run), whole)
    good = found == "identical" and seen in expected
    return Row(fault, case, f"{seen}, then {found}", good, "; ".join(wrong[:3]))


def terminated(case, whole, folder, seed):
    """SIGTERM at a random moment of training."""
    chance = Random(seed)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        outcome = attempt(case, folder, kill=Kill("term", seconds=chance.uniform(0.0, 0.6 * whole.seconds)))
        if outcome.end is None:  # otherwise the signal came too late
            return _until_it_ends(case, folder, whole, "SIGTERM", {"status 143"}, f"status {outcome.status}")


def second_process(case, whole, folder):
    """A second process that trains in the folder of a first."""
    first = killed_runs.start(case, folder)
    killed_runs.wait_until_it_trains(first)
    second = attempt(case, folder)
    refused = second.status == 1 and "Another process" in second.error
    found, wrong = _compared(killed_runs.finish(first), whole)
    seen = "second one refused" if refused else f"second one ended with status {second.status}"
    good = refused and found == "identical"
    return Row("second process", case, f"{seen}, first one {found}", good, "; ".join(wrong[:3]))


# --- damaged files ---------------------------------------------------------------------------------------------------


def interrupted(case, folder):
    """A run that was killed in its last stage, after a checkpoint."""
    outcome = attempt(case, folder, kill=Kill("step", number=LAST_STEPS[case.objectives]))
    if not outcome.killed:
        raise RuntimeError(f"The run was not killed: {outcome.error}")


def files_of(folder):
    """Files of a run and of the newest checkpoint in it."""
    checkpoints = sorted(folder.glob("stage-*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and (not relative.parts[0].startswith("stage-") or path.is_relative_to(checkpoints[-1])):
            yield relative


def kind_of(relative, newest):
    """A file's name without numbers; `newest` is the text of the newest manifest."""
    name = re.sub(r"-\d+", "", relative.name)
    if relative.parts[0] == "state":
        return f"state/{name}" + ("" if relative.name in newest else " (older)")
    return f"checkpoint/{name}" if relative.parts[0].startswith("stage-") else name


def damaged(case, whole, folder, before, relative, damage, kind):
    """Resume a run after damaging one of its files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(before, folder)
    DAMAGES[damage](folder / relative)
    outcome = attempt(case, folder)
    found, wrong = _compared(outcome, whole)
    said = relative.name in outcome.error or (relative.parent.name in outcome.error and len(relative.parts) > 2)
    training = [difference for difference in wrong if not difference.startswith(("log ", "files:"))]
    if outcome.end is None:
        named = said and "Error: " in outcome.error
        result, good = ("error that names it", True) if named else (found, False)
    elif not wrong:
        result, good = ("identical, warned" if said else "identical"), True
    elif not training and said:
        result, good = "identical but for the log, warned", True
    else:
        result, good = "different", False
    return Row(f"{damage}: {kind}", case, result, good, "" if good else "; ".join(wrong[:3]))


def all_damages(case, whole, folder):
    """Every file of an interrupted run, damaged in every way; with an adapter only what is its own."""
    before = Path(folder) / "before"
    interrupted(case, before)
    manifest = (before / killed_runs.STATE_FILE).read_text(encoding="utf-8")
    for relative in files_of(before):
        kind = kind_of(relative, manifest)
        if case.model == "lora" and not kind.startswith(("hbat_state", "state/", "checkpoint/adapter")):
            continue
        for damage in DAMAGES:
            if (before / relative).stat().st_size:
                yield damaged(case, whole, Path(folder) / "run", before, relative, damage, kind)


# --- disks -----------------------------------------------------------------------------------------------------------


class CannotMountError(RuntimeError):
    """This process may not mount a file system."""


@contextmanager
def small_disk(size):
    """A file system in memory, with a function that mounts it again with other options."""
    folder = Path(tempfile.mkdtemp(prefix="hbat-disk-"))

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMountError(done.stderr.strip() or "mount failed")

    try:
        mount(f"size={size}")
        try:
            yield folder, lambda options: mount(f"remount,{options}")
        finally:
            subprocess.run(["umount", str(folder)], check=False)
    finally:
        folder.rmdir()


def _error(outcome):
    lines = [line for line in outcome.error.splitlines() if re.match(r"[\w.]*Error: ", line)]
    return lines[-1].split(": ")[0].split(".")[-1] if lines else f"status {outcome.status}"


def full_disk(case, whole, size):
    """A disk that fills up during the run and then has room again."""
    with small_disk(size) as (folder, remount):
        outcome = attempt(case, folder / "run")
        if outcome.end is not None:
            return None
        remount("size=1g")
        return _until_it_ends(case, folder / "run", whole, "full disk", {"StorageError"}, _error(outcome))


def peak(case):
    """Bytes that a run takes on disk shortly before its end."""
    with small_disk("1g") as (folder, _):
        attempt(case, folder / "run", kill=Kill("step", number=LAST_STEPS[case.objectives]))
        return shutil.disk_usage(folder).used


def read_only(case, whole, *, begun):
    """A disk that becomes read-only before a run or during it."""
    with small_disk("1g") as (folder, remount):
        if begun:
            interrupted(case, folder / "run")
        remount("ro")
        outcome = attempt(case, folder / "run")
        remount("rw")
        fault = f"read-only {'within' if begun else 'before'} the run"
        return _until_it_ends(case, folder / "run", whole, fault, {"StorageError"}, _error(outcome))


def rows_of(case, folder, seed):
    """Yield a row per fault of this file, or a string that says what was skipped and why."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    whole = attempt(case, folder / "whole", resume=False)
    for index in range(3):
        yield terminated(case, whole, folder / "term", f"{seed} {index}")
    yield second_process(case, whole, folder / "second")
    try:
        most = peak(case)
        for share in (0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9):
            row = full_disk(case, whole, int(share * most))
            if row is not None:
                yield row
        for begun in (False, True):
            yield read_only(case, whole, begun=begun)
    except CannotMountError as error:
        yield f"full disk and read-only folder skipped: {error}"
    yield from all_damages(case, whole, folder)
    shutil.rmtree(folder)
