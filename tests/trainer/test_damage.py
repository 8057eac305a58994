"""What a damaged file in a run's folder does: the run ends to the last bit as a whole one, or the file is named."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import runs
import torch
from disks import files_of_at_most, mounted
from faults import DAMAGES, Faults, full_disk
from kills import ADAM, CutOffError, Kill
from safetensors.torch import load_file
from transformers import TrainerCallback

from hbat.objectives.sft import SFT
from hbat.state.files import StorageError
from hbat.state.manifest import RunStateError

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

SAVES = ADAM | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


class CountingSFT(SFT):
    """SFT that keeps the number of its steps."""

    def state_dict(self, trainer):
        return {"steps": torch.tensor(getattr(trainer, "steps_before", 0.0) + trainer.state.global_step)}

    def load_state_dict(self, trainer, state):
        trainer.steps_before = float(state["steps"])


def build(folder, **options):
    """A run of SFT, which keeps something of its own, and DPO, whose evaluation needs the run's initial weights."""
    objective = CountingSFT(config=runs.section(**SAVES))
    return runs.build_run(
        cases.tiny_llama(),
        folder,
        **{
            "objectives": [objective, "dpo"], "dpo": SAVES, "optimizer_state": "carry", "ewc": {"strength": 1.0},
            "evaluation": runs.rows(2, sft=8, dpo=8),
        }
        | options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """The folder of a run that was cut off in its third stage of four, at the last of three steps."""
    folder = tmp_path_factory.mktemp("cut-off")
    with pytest.raises(CutOffError):
        build(folder, callbacks=[Kill(2, "step", 3)]).train()
    assert len(list((folder / "stage-002-sft").glob("checkpoint-*"))) == 2
    return folder


@pytest.fixture(scope="module")
def whole(cut_off, tmp_path_factory):
    run = build(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def assert_equal(run, expected, *, log=True):
    assert runs.same(cases.weights(run.model), cases.weights(expected.model))
    assert run.matrix.rows == expected.matrix.rows
    folders = [Path(each.args.output_dir) for each in (run, expected)]
    states = [json.loads((each / "hbat_state.json").read_text()) for each in folders]
    assert states[0]["files"] == states[1]["files"]
    for kind in states[0]["files"]:
        assert runs.same(*(runs.state_tensors(each, kind) for each in folders)), kind
    if log:
        # The trainer's count of tokens starts at zero at a checkpoint.
        logs = [[{key: each[key] for key in each if "num_tokens" not in key} for each in run.state.log_history]]
        logs += [[{key: each[key] for key in each if "num_tokens" not in key} for each in expected.state.log_history]]
        assert logs[0] == logs[1]


CHECKPOINT = "stage-002-sft/checkpoint-2/"
#: Files of the run that was cut off, with the stage from which it resumes; none where no complete state is left.
FILES = {
    "weights": ("state/weights-002.safetensors", 1),
    "importance of the newest state": ("state/importance-dpo-001.safetensors", 1),
    "displacement of the newest state": ("state/displacement-dpo-001.safetensors", 1),
    "moments of the newest state": ("state/optimizer-dpo-001.safetensors", 1),
    "importance of both states": ("state/importance-sft-000.safetensors", None),
    "moments of both states": ("state/optimizer-sft-000.safetensors", None),
    "kept, of both states": ("state/kept-sft-000.safetensors", None),
    "initial weights": ("state/weights-000.safetensors", None),
    "manifest": ("hbat_state.json", 1),
    "manifest of the previous state": ("hbat_state.previous.json", 2),
    "log": ("trainer_state.json", 2),
    "checkpoint: model": (CHECKPOINT + "model.safetensors", 2),
    "checkpoint: optimizer": (CHECKPOINT + "optimizer.pt", 2),
    "checkpoint: schedule": (CHECKPOINT + "scheduler.pt", 2),
    "checkpoint: random states": (CHECKPOINT + "rng_state.pth", 2),
    "checkpoint: state": (CHECKPOINT + "trainer_state.json", 2),
    "checkpoint: arguments": (CHECKPOINT + "training_args.bin", 2),
    "checkpoint: path integral": (CHECKPOINT + "path_integral.safetensors", 2),
    "checkpoint: checksums": (CHECKPOINT + "hbat_checksums.json", 2),
}
SILENT = {"manifest of the previous state"}  # of no use to the run unless the newest state is damaged too


#: What takes the same path as the file above it.
SAME_PATH = {
    "importance of the newest state", "displacement of the newest state", "moments of the newest state",
    "checkpoint: optimizer", "checkpoint: schedule", "checkpoint: random states", "checkpoint: state",
    "checkpoint: arguments", "checkpoint: path integral",
}  # fmt: skip


def _cases():
    """Every kind of file with every damage; outside of `make test-all` each path with one damage in turn."""
    for number, (kind, (name, resumes_at)) in enumerate(FILES.items()):
        for turn, (how, damage) in enumerate(DAMAGES.items()):
            slow = number % len(DAMAGES) != turn or kind in SAME_PATH
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(kind, name, resumes_at, damage, id=f"{kind} {how}", marks=marks)


@pytest.mark.parametrize(("kind", "name", "resumes_at", "damage"), list(_cases()))
def test_a_damaged_file_is_skipped_or_named(kind, name, resumes_at, damage, cut_off, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(cut_off, folder)
    damage(folder / name)
    first = []
    run = build(folder, callbacks=[Begins(first)])
    if resumes_at is None:
        before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file() and each.name != "hbat.lock"}
        with pytest.raises(RunStateError, match=f"{folder / name} (is|has|cannot) "):
            run.train(resume_from_checkpoint=True)
        assert all(each.read_bytes() == content for each, content in before.items())
        return
    run.train(resume_from_checkpoint=True)
    assert_equal(run, whole, log=kind != "log")
    assert (Path(name).name in caplog.text) is (kind not in SILENT)
    assert first[0].startswith(f"stage-{resumes_at:03d}")
    assert not list(folder.rglob("*.tmp"))


class Begins(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(Path(args.output_dir).name)


def test_with_all_checkpoints_damaged_the_stage_starts_anew(cut_off, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(cut_off, folder)
    for each in (1, 2):
        DAMAGES["one bit flipped"](folder / "stage-002-sft" / f"checkpoint-{each}" / "optimizer.pt")
    run = build(folder)
    run.train(resume_from_checkpoint=True)
    assert_equal(run, whole)
    assert caplog.text.count("optimizer.pt is not what was written") == 2


def test_a_run_that_keeps_one_state_names_the_damaged_file(tmp_path):
    with pytest.raises(CutOffError):
        build(tmp_path, callbacks=[Kill(1, "begin")], keep_states=1, num_rounds=1).train()
    DAMAGES["zeroed"](tmp_path / "state" / "weights-001.safetensors")
    with pytest.raises(RunStateError, match=r"weights-001\.safetensors is not what was written"):
        build(tmp_path, keep_states=1, num_rounds=1).train(resume_from_checkpoint=True)


# --- disks that are full ---------------------------------------------------------------------------------------------


def fill(file):
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))


class FillUp(TrainerCallback):
    """Fills the disk at the end of one stage."""

    def __init__(self, stage, fill):
        self.stage, self.fill, self.current = stage, fill, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1

    def on_train_end(self, args, state, control, **kwargs):
        if self.current == self.stage:
            self.fill()


def unsaved(**options):
    """Without checkpoints inside the stages, which transformers writes."""
    return {"dpo": ADAM, "objectives": ["sft", "dpo"], "sft": ADAM, "num_rounds": 1, "evaluation": None} | options


def test_a_disk_that_fills_up_between_stages_stops_the_run_which_resumes_once_there_is_room(tmp_path):
    expected = build(tmp_path / "whole", **unsaved())
    expected.train()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m") as folder:
        rubbish = folder / "rubbish"

        run = build(folder / "run", callbacks=[FillUp(1, lambda: fill(rubbish))], **unsaved())
        with pytest.raises(
            StorageError, match=r"/run/.* cannot be written, with .* free there: No space left"
        ) as error:
            run.train()
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(StorageError):  # still full
            build(folder / "run", **unsaved()).train(resume_from_checkpoint=True)
        rubbish.unlink()
        assert not list(folder.rglob("*.tmp"))
        again = build(folder / "run", **unsaved())
        again.train(resume_from_checkpoint=True)
        assert_equal(again, expected)


class FillUpAtStep(TrainerCallback):
    def __init__(self, fill):
        self.fill = fill

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.fill()


def test_a_disk_that_is_full_for_a_checkpoint_leaves_a_run_that_resumes(tmp_path):
    options = unsaved(objectives=["sft"], sft=SAVES, num_rounds=1, ewc=None) | {"data": {"sft": cases.sft_rows(8, 3)}}
    expected = build(tmp_path / "whole", **options)
    expected.train()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m") as folder:
        rubbish = folder / "rubbish"
        run = build(folder / "run", callbacks=[FillUpAtStep(lambda: fill(rubbish))], **options)
        with pytest.raises(Exception, match=r"No space left|PytorchStreamWriter|inline_container"):
            run.train()
        rubbish.unlink()
        again = build(folder / "run", **options)
        again.train(resume_from_checkpoint=True)
        assert_equal(again, expected)


@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_write_that_fails_leaves_the_state_before_and_the_first_error_stands(number, tmp_path, monkeypatch):
    def fail():
        Faults(monkeypatch, at=number, raises=full_disk, only=("write",))

    run = build(tmp_path, callbacks=[FillUp(1, fail)], **unsaved())
    with pytest.raises(StorageError, match=r"cannot be written.*resume with `resume_from_checkpoint=True`"):
        run.train()
    monkeypatch.undo()
    assert json.loads((tmp_path / "hbat_state.json").read_text())["next_stage"] == 1
    assert not list(tmp_path.rglob("*.tmp"))
    build(tmp_path, **unsaved()).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_fit_is_named_and_the_run_resumes(whole, tmp_path):
    weights = sum(each.nbytes for each in whole.model.state_dict().values())
    with files_of_at_most(weights * 3 // 2), pytest.raises(StorageError, match=r"cannot be written.*`--resume`"):
        build(tmp_path).train()  # two moments for each weight
    run = build(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert_equal(run, whole)


# --- two processes on one folder -------------------------------------------------------------------------------------


def test_a_second_run_is_kept_out_while_the_first_trains(tmp_path):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(RunStateError, match=r"Another process \(process .* on .*\) trains into") as refusal:
                second.train(resume_from_checkpoint=True)
            refused.append(refusal)

    refused, options = [], {"objectives": ["sft"], "data": {"sft": cases.sft_rows(8)}, "num_rounds": 1}
    second = runs.build_run(cases.tiny_llama(), tmp_path, **options)
    runs.train(cases.tiny_llama(), tmp_path, callbacks=[Second()], **options)
    assert len(refused) == runs.STEPS
    assert second.train(resume_from_checkpoint=True).global_step == runs.STEPS


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
import cases, runs
from transformers import TrainerCallback

class Hold(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("trains", flush=True)
        sys.stdin.readline()

if __name__ == "__main__":
    runs.torch.set_num_threads(1)
    runs.train(cases.tiny_llama(), sys.argv[1], callbacks=[Hold()], num_rounds=1)
"""


@pytest.mark.slow  # a process; `state/test_lock.py` kills one that holds the lock, `test_resume.py` one that trains
def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path):
    root = Path(__file__).parents[2]
    script, folder = tmp_path / "first.py", tmp_path / "run"
    paths = [str(root / "tests" / "support"), str(root / "src")]
    script.write_text(SCRIPT.format(paths=paths), encoding="utf-8")
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ
    ) as first:
        try:
            while b"trains" not in (line := first.stdout.readline()):
                assert line, "the first process ended early"
            second = runs.build_run(cases.tiny_llama(), folder, num_rounds=1)
            with pytest.raises(RunStateError, match=rf"Another process \(process {first.pid} on .*\) trains into"):
                second.train(resume_from_checkpoint=True)
        finally:
            first.send_signal(signal.SIGKILL)
    second.train(resume_from_checkpoint=True)
    assert json.loads((folder / "hbat_state.json").read_text())["next_stage"] == 2


# --- what may change -------------------------------------------------------------------------------------------------


def test_an_allowed_change_holds_from_the_start_of_the_stage_under_way(tmp_path, caplog):
    """The run ends as one whose second stage had the new rate from its first step, and says so for ever."""
    caplog.set_level(logging.INFO, logger="hbat")
    faster = ADAM | {"learning_rate": 0.02}
    options = unsaved(dpo=SAVES)
    with pytest.raises(CutOffError):
        build(tmp_path / "run", callbacks=[Kill(1, "step", 3)], **options).train()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with pytest.raises(RunStateError, match=r"dpo\.learning_rate: 0\.01 -> 0\.02\. Values may .*`allow_changed`"):
        build(tmp_path / "run", **unsaved(dpo=faster)).train(resume_from_checkpoint=True)
    changed = build(tmp_path / "run", **unsaved(dpo=faster))
    changed.train(resume_from_checkpoint=True, allow_changed=["dpo.learning_rate"])
    assert "The run is resumed from stage 1 with: dpo.learning_rate: 0.01 -> 0.02." in caplog.text
    shutil.rmtree(tmp_path / "other" / "stage-001-dpo")
    anew = build(tmp_path / "other", **unsaved(dpo=faster))
    anew.train(resume_from_checkpoint=True, allow_changed=["dpo."])
    assert runs.same(cases.weights(changed.model), cases.weights(anew.model))
    manifest = json.loads((tmp_path / "run" / "hbat_state.json").read_text())
    assert manifest["changes"] == [{"stage": 1, "changes": ["dpo.learning_rate: 0.01 -> 0.02"]}]
    finished = build(tmp_path / "run", **unsaved(dpo=faster))
    finished.train(resume_from_checkpoint=True)
    assert f"The run in {tmp_path / 'run'} is finished; nothing is left to train." in caplog.text


def test_allowed_changes_are_a_list_and_of_a_run_that_resumes(tmp_path):
    run = build(tmp_path, **unsaved())
    with pytest.raises(TypeError, match=r"`allow_changed` is 'dpo\.beta'; give a list"):
        run.train(resume_from_checkpoint=True, allow_changed="dpo.beta")
    with pytest.raises(ValueError, match="it needs `resume_from_checkpoint=True`"):
        run.train(allow_changed=["dpo.beta"])
    assert not (tmp_path / "hbat_state.json").exists()


def test_every_checkpoint_is_sealed_whole(cut_off):
    for each in (cut_off / "stage-002-sft").glob("checkpoint-*"):
        sealed = json.loads((each / "hbat_checksums.json").read_text())["files"]
        assert {*sealed, "hbat_checksums.json"} == {str(file.relative_to(each)) for file in each.rglob("*")}
    assert load_file(cut_off / "state" / "kept-sft-000.safetensors")["steps"] == 3
