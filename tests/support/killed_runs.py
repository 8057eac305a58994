"""Runs that are killed at random moments and resumed: configurations, processes, and how their ends are compared.

Everything is imported once; every run is a fork of this process, which itself never computes. So a run costs what it
trains, and a kill is a real one: SIGKILL from outside after a time, SIGKILL at an operation on the run's files, or the
kernel's own in the middle of a write.
"""
# ruff: noqa: E402 - libraries read the environment as they are imported

import gc
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # threads do not survive a fork
sys.modules["matplotlib"] = None  # as where it is not installed: a picture takes longer than a stage

import cases
import online_runs
import peft  # noqa: F401 - so that no run has to import it
import ppo_cases
import runs
import torch
import trl
from kill_plan import GROUPS, PHASES, Case, Kill, differences, draw_kill
from transformers import GenerationMixin, TrainerCallback

from hbat.config.hbat import HBATConfig
from hbat.objectives import dpo, ppo, sft  # noqa: F401 - loaded lazily otherwise, by every run anew
from hbat.state.folder import RunFolder
from hbat.state.manifest import STATE_FILE
from hbat.trainer import HBATTrainer

TRAINERS = (trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer)  # for the same reason
torch.set_num_threads(1)
gc.collect()
gc.freeze()

# --- configurations --------------------------------------------------------------------------------------------------

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_steps": 3}
#: Fields of each objective's section.
SECTIONS = {
    "sft": ADAM,
    "dpo": ADAM,
    "ppo": ppo_cases.SIZES | ADAM | {"max_steps": -1, "num_train_epochs": 1},
    "grpo": online_runs.ROLLOUT | ADAM,
}
#: Training rows, and rows for evaluation.
ROWS = {
    "sft": (lambda: cases.sft_rows(8, 3), lambda: cases.sft_rows(2, 1)),
    "dpo": (lambda: cases.preference_rows(8, 3), lambda: cases.preference_rows(2, 1)),
    "ppo": (lambda: ppo_cases.prompts(16), lambda: ppo_cases.prompts(3)),
    "grpo": (lambda: online_runs.prompts(8), lambda: online_runs.prompts(3, 1)),
}
MODELS = {"full": cases.tiny_llama, "lora": lambda seed: cases.lora_llama(seed, dropout=0.1)}


def build(case, folder, *, rewards, callbacks=None, rounds=2):
    """The run of a configuration."""
    names = case.objectives.split("+")
    saves = {"save_strategy": "steps", "save_steps": 1} if case.checkpoints == "in stages" else {}
    return HBATTrainer(
        model=MODELS[case.model](0),
        args=HBATConfig(
            output_dir=str(folder),
            objectives=names,
            num_rounds=rounds,
            ewc={
                "strength": 1.0 if case.method == "gradient" else 10.0,
                "method": case.method,
                "granularity": case.granularity,
                "source": case.source,
            },
            optimizer_state=case.optimizer_state,
            disable_tqdm=True,
            seed=runs.SEED,
            **{name: runs.section(**SECTIONS[name] | saves) for name in names},
        ),
        train_dataset={name: ROWS[name][0]() for name in names},
        eval_dataset={name: ROWS[name][1]() for name in (names if case.evaluates_all else names[:1])},
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=rewards if {"ppo", "grpo"} & {*names} else None,
        callbacks=callbacks,
    )


# --- what the end of a run is compared by ----------------------------------------------------------------------------


def _digest(tensor):
    values = tensor.detach().contiguous().numpy()
    return f"{hashlib.sha256(values.tobytes()).hexdigest()[:16]} {values.dtype} {list(values.shape)}"


#: Entries of the log that no two runs share: times; and TRL's count of tokens, which begins anew at a checkpoint.
_UNLIKE = ("num_tokens", "step_time", "seconds/")


def summary(run, folder):
    """The end of a run as plain values: weights, all that its state holds, forgetting matrix, log, names of files."""
    on_disk = RunFolder(folder)
    state = on_disk.read()
    described = {f"weights {name}": _digest(each) for name, each in cases.weights(run.model).items()}
    for kind in state.files:
        tensors = on_disk.read_tensors(state, kind)
        described |= {f"{kind} {name}": _digest(each) for name, each in tensors.items()}
    log = [
        {key: each[key] for key in each if not any(part in key for part in _UNLIKE)} for each in run.state.log_history
    ]
    described |= {f"log {index}": each for index, each in enumerate(log)}
    described |= {f"matrix {index}": each for index, each in enumerate(run.matrix.rows)}
    described["steps"] = [run.state.global_step, state.global_step, state.next_stage]
    described["files"] = sorted(str(each.relative_to(folder)) for each in Path(folder).rglob("*") if each.is_file())
    return json.loads(json.dumps(described))


# --- a run that is watched, and killed -------------------------------------------------------------------------------

_AT_FILES = {"operation", "empty", "torn"}
_TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
_MANIFESTS = Path(STATE_FILE).stem
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Notes:
    """Memory that a run shares with the process that kills it: its phase, and how many operations there were."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 1 + 4 * len(GROUPS))

    @property
    def phase(self):
        return PHASES[self._memory[0]]

    @phase.setter
    def phase(self, name):
        self._memory[0] = PHASES.index(name)

    def _place(self, group):
        start = 1 + 4 * GROUPS.index(group)
        return slice(start, start + 4)

    def operations(self, group):
        return int.from_bytes(self._memory[self._place(group)], "little")

    def count(self, group):
        number = self.operations(group) + 1
        self._memory[self._place(group)] = number.to_bytes(4, "little")
        return number


class Phases(TrainerCallback):
    """Notes what a run is doing."""

    def __init__(self, notes, kill):
        self.notes, self.steps, self.last = notes, 0, kill.number if kill is not None and kill.kind == "step" else None

    def on_train_begin(self, args, state, control, **kwargs):
        self.notes.phase = "update"

    def on_step_begin(self, args, state, control, **kwargs):
        self.notes.phase = "update"
        self.steps += 1
        if self.steps == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.notes.phase = "checkpoint"

    def on_save(self, args, state, control, **kwargs):
        self.notes.phase = "update"

    def on_train_end(self, args, state, control, **kwargs):
        self.notes.phase = "commit"

    def rewards(self, completions, **columns):
        """Rewards of the text alone, at the end of a rollout."""
        if self.notes.phase == "rollout":
            self.notes.phase = "update"
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        return [(sum(map(ord, text)) % 13) / 13 - 0.1 * len(text) for text in texts]

    def watch(self, run):
        evaluate, generate, notes = run.evaluate, GenerationMixin.generate, self.notes

        def evaluates():
            notes.phase = "evaluation"
            results = evaluate()
            notes.phase = "commit"
            return results

        def generates(*args, **kwargs):
            if notes.phase == "update":
                notes.phase = "rollout"
            return generate(*args, **kwargs)

        run.evaluate, GenerationMixin.generate = evaluates, generates


class Operations:
    """Counts operations on the files of a run, and ends the process at one of them."""

    def __init__(self, folder, notes, kill):
        self.folder, self.notes, self.kill = f"{folder}{os.sep}", notes, kill
        self.removes = False  # a whole folder of the run, file by file and by names without a path
        self.busy = False
        sys.addaudithook(self.see)

    def see(self, event, arguments):
        if event not in _TOUCHES or self.busy:
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        ours = path.startswith(self.folder)
        if event == "shutil.rmtree":
            self.removes = ours
        if event == "open":
            writes = arguments[2] & _WRITES if isinstance(arguments[2], int) else False
            if not ours or not (writes or path.endswith(".tmp")):
                return
        elif not ours and not (self.removes and path and os.sep not in path):
            return
        self.busy = True
        try:
            self._operation(event, path, arguments)
        finally:
            self.busy = False

    def _operation(self, event, path, arguments):
        place, *_ = Path(path.removeprefix(self.folder)).parts or ("",)
        group = "state" if place == "state" or place.startswith(_MANIFESTS) else "other"
        number = self.notes.count(group)
        kill = self.kill
        if kill is not None and kill.kind in _AT_FILES and (group, number) == (kill.group, kill.number):
            if kill.kind == "empty" and event == "open":
                os.close(os.open(path, arguments[2], 0o644))
            if kill.kind in {"operation", "empty"}:
                if group == "state" or self.removes:
                    self.notes.phase = "commit"
                elif not place.startswith("stage-"):
                    self.notes.phase = "reports"
                os.kill(os.getpid(), signal.SIGKILL)
            elif kill.kind == "torn":
                resource.setrlimit(resource.RLIMIT_FSIZE, (kill.size, kill.size))
        if event == "os.rename" and os.fspath(arguments[1]) == f"{self.folder}{STATE_FILE}":
            self.notes.phase = "building"


@dataclass
class Outcome:
    """How a process ended."""

    status: int
    phase: str
    seconds: float
    operations: dict
    error: str
    end: dict | None

    @property
    def killed(self):
        return self.status in {-signal.SIGKILL, -signal.SIGXFSZ}


def attempt(case, folder, *, resume=True, kill=None):
    """Train a run in a process of its own until it ends or is killed."""
    return finish(start(case, folder, resume=resume, kill=kill))


@dataclass
class Started:
    """A process that trains."""

    process: int
    began: float
    notes: Notes
    desk: Path
    kill: Kill | None
    status: int | None = field(default=None)


def start(case, folder, *, resume=True, kill=None):
    """Begin to train a run in a process of its own."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads: a process with threads must not be forked.")
    notes, desk = Notes(), Path(tempfile.mkdtemp(prefix="hbat-desk-"))
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        _train(case, Path(folder), resume, kill, notes, desk)
    return Started(process, began, notes, desk, kill)


def _train(case, folder, resume, kill, notes, desk):
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        limited = kill is not None and kill.kind == "torn"
        os.dup2(quiet if limited else os.open(desk / "errors", os.O_WRONLY | os.O_CREAT), 2)
        tempfile.tempdir = str(desk)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        phases = Phases(notes, kill)
        Operations(folder, notes, kill)
        run = build(case, folder, rewards=phases.rewards, callbacks=[phases])
        phases.watch(run)
        run.train(resume_from_checkpoint=resume)
        (desk / "end.json").write_text(json.dumps(summary(run, folder)), encoding="utf-8")
        status = 0
    except SystemExit as ending:
        status = ending.code
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it is
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(started, seconds):
    """Wait for a process; True when it has ended."""
    until = time.monotonic() + seconds
    while started.status is None:
        ended, status = os.waitpid(started.process, os.WNOHANG)
        if ended:
            started.status = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            return False
        else:
            time.sleep(min(0.005, max(0.0, until - time.monotonic())))
    return True


def wait_until_it_trains(started):
    """Wait until a process is in its first stage, or has ended."""
    while started.notes.phase not in {"update", "rollout"} and not _wait(started, 0.0):
        time.sleep(0.002)


def finish(started):
    """Wait for the end of a process, and end it where that is asked for."""
    if started.kill is not None and started.kill.kind == "term":
        wait_until_it_trains(started)
    if started.kill is not None and started.kill.kind in {"time", "term"} and not _wait(started, started.kill.seconds):
        os.kill(started.process, signal.SIGTERM if started.kill.kind == "term" else signal.SIGKILL)
    while not _wait(started, 60.0):
        pass
    seconds, end, desk = time.monotonic() - started.began, started.desk / "end.json", started.desk
    errors = (desk / "errors").read_text(encoding="utf-8", errors="replace") if (desk / "errors").exists() else ""
    outcome = Outcome(
        status=started.status,
        phase=started.notes.phase,
        seconds=seconds,
        operations={group: started.notes.operations(group) for group in GROUPS},
        error=errors,
        end=json.loads(end.read_text(encoding="utf-8")) if started.status == 0 else None,
    )
    shutil.rmtree(desk)
    return outcome


# --- a run that is killed until it has come to its end ---------------------------------------------------------------


@dataclass
class Report:
    """What became of a run that was killed."""

    number: int
    seed: int
    case: Case
    kills: list = field(default_factory=list)
    resumes: int = 0
    seconds: float = 0.0
    wrong: list = field(default_factory=list)

    @property
    def identical(self):
        return not self.wrong

    def as_dict(self):
        return asdict(self) | {"identical": self.identical}


def _left(folder, stages=4):
    try:
        return 1 - json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["next_stage"] / stages
    except FileNotFoundError:
        return 1.0


def kill_and_resume(number, case, seed, folder, *, most_kills=4, whole=None):
    """Kill a run again and again, resume it until it is done, and compare its end with the uninterrupted run's."""
    chance = random.Random(f"{seed} {number}")
    began, report, run = time.monotonic(), Report(number, seed, case), Path(folder) / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run.parent.mkdir(parents=True)
    whole = whole or attempt(case, Path(folder) / "whole", resume=False)
    if whole.end is None:
        report.wrong = [f"the uninterrupted run ended with status {whole.status}: {whole.error[-2000:]}"]
        return report
    planned = chance.randint(1, most_kills)
    while True:
        kill = draw_kill(chance, whole, _left(run), first=not report.kills) if len(report.kills) < planned else None
        if run.exists():  # to look at, should the run not resume from here
            shutil.copytree(run, run.with_name(f"before-{len(report.kills)}"), dirs_exist_ok=True)
        outcome = attempt(case, run, kill=kill)
        report.resumes += bool(report.kills)
        if outcome.killed:
            report.kills.append({"kind": kill.kind, "phase": outcome.phase} | asdict(kill))
        elif outcome.end is None:
            report.wrong = [f"ended with status {outcome.status}: {outcome.error[-2000:]}"]
            break
        elif report.kills:
            report.wrong = differences(outcome.end, whole.end)
            break
        else:  # it was over before the kill
            shutil.rmtree(run)
    report.seconds = time.monotonic() - began
    if report.identical:
        shutil.rmtree(folder)
    return report


def in_parallel(tasks, workers, folder):
    """Do tasks in processes of their own, each a function that yields plain values; all values, in no order."""
    folder = Path(folder)
    files = [folder / f"worker-{number}.jsonl" for number in range(workers)]
    processes = []
    for number, file in enumerate(files):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                with file.open("w", encoding="utf-8") as lines:
                    for task in tasks[number::workers]:
                        for values in task():
                            lines.write(json.dumps(values) + "\n")
                status = 0
            except BaseException:  # noqa: BLE001 - the process ends here, whatever it is
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]
    if any(statuses):
        raise RuntimeError(f"Processes of the campaign ended with {statuses}.")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
