"""A run that gets a signal saves at the next step and ends with a status; a second signal ends it at once."""

import builtins
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cases
import pytest
import runs
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbat.config.hbat import HBATConfig
from hbat.objectives.objective import Objective
from hbat.stages.interruption import RunInterrupted, StopRequest, interrupted
from hbat.trainer import HBATTrainer

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_steps": 4}
OPTIONS = {"sft": ADAM, "dpo": ADAM, "optimizer_state": "carry", "ewc": {"strength": 1.0}}


class Signal(TrainerCallback):
    """Sends a signal to its own process within one step of one stage."""

    def __init__(self, number, stage, step):
        self.number, self.stage, self.step, self.current = number, stage, step, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.current, state.global_step + 1) == (self.stage, self.step):
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.train(cases.tiny_llama(0), tmp_path_factory.mktemp("whole"), **OPTIONS)


TERM, INT = (signal.SIGTERM, 143), (signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("number", "status", "stage", "step"),
    [
        (*TERM, 0, 1),
        (*INT, 3, 3),
        pytest.param(*TERM, 1, 2, marks=pytest.mark.slow),
        pytest.param(*INT, 0, 1, marks=pytest.mark.slow),
        pytest.param(*INT, 1, 2, marks=pytest.mark.slow),
        pytest.param(*TERM, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_resumes_from_there(
    number, status, stage, step, whole, tmp_path
):
    with pytest.raises(RunInterrupted) as ending:
        runs.train(cases.tiny_llama(0), tmp_path, callbacks=[Signal(number, stage, step)], **OPTIONS)
    assert ending.value.code == status
    assert ending.value.signal == number
    (folder,) = tmp_path.glob(f"stage-{stage:03d}-*")
    assert [each.name for each in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = runs.train(cases.tiny_llama(0), tmp_path, resume=True, **OPTIONS)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))


def test_a_signal_in_a_stages_last_step_ends_the_run_between_stages(whole, tmp_path):
    with pytest.raises(RunInterrupted):
        runs.train(cases.tiny_llama(0), tmp_path, callbacks=[Signal(signal.SIGTERM, 1, 4)], **OPTIONS)
    assert not list(tmp_path.glob("stage-*"))
    resumed = runs.train(cases.tiny_llama(0), tmp_path, resume=True, **OPTIONS)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))


class Evaluated(SFTTrainer):
    """Sends SIGINT in one of its evaluation steps once `armed`; counts the steps."""

    armed, steps, at = False, 0, 2

    def prediction_step(self, *args, **kwargs):
        Evaluated.steps += Evaluated.armed
        if Evaluated.armed and Evaluated.steps == Evaluated.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().prediction_step(*args, **kwargs)


@pytest.mark.parametrize("at", [2, 12], ids=["the first evaluation", "the last batch of the last one"])
def test_a_signal_in_an_evaluation_between_stages_ends_the_run_after_its_batch(at, tmp_path, monkeypatch):
    own = Objective(
        name="own", trainer_class=Evaluated, config_class=SFTConfig, config=runs.section(per_device_eval_batch_size=1)
    )
    run = HBATTrainer(
        model=cases.tiny_llama(),
        args=HBATConfig(output_dir=str(tmp_path), objectives=[own], disable_tqdm=True),
        train_dataset={"own": cases.sft_rows(4)},
        eval_dataset={"own": cases.sft_rows(6)},
        processing_class=cases.tiny_tokenizer(),
    )
    monkeypatch.setattr(Evaluated, "armed", True)
    monkeypatch.setattr(Evaluated, "steps", 0)
    monkeypatch.setattr(Evaluated, "at", at)
    with pytest.raises(RunInterrupted, match=r"^The run was stopped by SIGINT and is saved\. .* resumes it"):
        run.train()
    assert Evaluated.steps == at
    monkeypatch.setattr(Evaluated, "armed", False)
    assert run.train(resume_from_checkpoint=True).global_step == runs.STEPS


@pytest.mark.parametrize(("in_notebook", "kind"), [(False, SystemExit), (True, KeyboardInterrupt)])
def test_it_ends_a_process_or_a_notebooks_cell(in_notebook, kind, monkeypatch):
    if in_notebook:
        monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
    error = interrupted(signal.SIGTERM)
    assert isinstance(error, kind)
    assert isinstance(error, SystemExit) is not in_notebook


def test_signals_mean_what_they_did_before_once_nobody_listens():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(RunInterrupted):
            request.raise_if_agreed()
    assert {number: signal.getsignal(number) for number in before} == before


def test_in_another_thread_nobody_listens():
    found = []

    def listen():
        with StopRequest().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_that_comes_while_a_lock_of_logging_is_held_waits_for_nothing(monkeypatch):
    lock, said, handler = threading.Lock(), threading.Event(), logging.Handler()

    def emit(record):
        with lock:
            said.set()

    monkeypatch.setattr(handler, "emit", emit)
    logger = logging.getLogger("hbat.stages.interruption")
    logger.addHandler(handler)
    request = StopRequest()
    try:
        with request.listening():
            with lock:
                os.kill(os.getpid(), signal.SIGTERM)
            assert request.agreed() == signal.SIGTERM
        assert said.wait(30)
    finally:
        logger.removeHandler(handler)


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
from hbat.stages.interruption import StopRequest

request = StopRequest()
with request.listening():
    print("ready", flush=True)
    while not request.agreed():
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_the_process_at_once(number, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parents[2] / "src")]), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "first\n"
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == -number
        assert "On disk are the start of the stage" in process.stderr.read()
        assert time.monotonic() - begun < 30
