"""Runs that are cut off at one moment of one stage, and what a resumed run must equal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import cases
import runs
from transformers import TrainerCallback

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_steps": 3}


class CutOffError(RuntimeError):
    pass


class Kill(TrainerCallback):
    """Raises at one moment of one stage."""

    def __init__(self, stage, event, step=0):
        self.stage, self.event, self.step, self.current = stage, event, step, -1

    def _hit(self, event, step):
        if (self.current, event, step) == (self.stage, self.event, self.step):
            self._end()

    def _end(self):
        raise CutOffError

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1
        self._hit("begin", 0)

    def on_step_end(self, args, state, control, **kwargs):
        self._hit("step", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._hit("save", state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._hit("end", 0)

    def on_evaluate(self, args, state, control, **kwargs):
        self._hit("evaluate", 0)


class KillProcess(Kill):
    """Kills its own process at one moment of one stage."""

    def _end(self):
        os.kill(os.getpid(), signal.SIGKILL)


PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]


def run_until_killed(program, *arguments):
    """Run a program that ends by SIGKILL, in a process of its own that finds this folder and the library."""
    begin = f"import sys; sys.path[:0] = {PATHS!r}; import torch; torch.set_num_threads(1)\n"
    command = [sys.executable, "-c", begin + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def options(state, save_steps=None):
    saves = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {}
    return {
        "sft": ADAM | saves,
        "dpo": ADAM | saves,
        "optimizer_state": state,
        "ewc": {"strength": 1.0},
    }


def log(run):
    """The log without the trainer's count of tokens, which starts at zero at a checkpoint."""
    return [{key: each[key] for key in each if not key.endswith("num_tokens")} for each in run.state.log_history]


def assert_equal(run, expected):
    """Weights, what objectives have left, forgetting matrix and log are those of the other run, to the last bit."""
    assert runs.same(cases.weights(run.model), cases.weights(expected.model))
    sums, others = (each._run.consolidation.accumulated for each in (run, expected))  # noqa: SLF001
    assert {name: record.keys() for name, record in sums.items()} == {
        name: each.keys() for name, each in others.items()
    }
    assert all(runs.same(each, others[name][kind]) for name, record in sums.items() for kind, each in record.items())
    assert run.matrix.rows == expected.matrix.rows
    assert run.state.global_step == expected.state.global_step
    assert log(run) == log(expected)
