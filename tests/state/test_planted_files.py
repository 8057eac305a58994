"""Whatever lies in a run's folder runs no code: it is skipped, or refused by name."""

import json
import logging
import pickle
import shutil

import cases
import malice
import pytest
import run_files
import runs
import torch
from transformers import TrainerCallback

from hbat.cli.build import build_trainer
from hbat.cli.run_file import parse
from hbat.stages.checkpoints import seal
from hbat.state.files import checksum, digest
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunStateError

pytestmark = [
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]

FORMS = ("pickle", "torch")
slow = pytest.mark.slow
SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
OPTIONS = {"sft": SAVES, "dpo": SAVES, "num_rounds": 1, "ewc": {"strength": 1.0}}


class CutOffError(RuntimeError):
    pass


class Kill(TrainerCallback):
    """Ends the run in its second stage, after its second step and before that step's checkpoint."""

    stage = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage += 1

    def on_step_end(self, args, state, control, **kwargs):
        if (self.stage, state.global_step) == (1, 2):
            raise CutOffError


@pytest.fixture
def marker(tmp_path):
    """A file that is there if code of a planted file has run."""
    return tmp_path / "code-has-run"


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_file_runs_its_code_when_it_is_unpickled(form, marker, tmp_path):
    malice.plant(tmp_path / "file", marker, form)
    if form == "pickle":
        pickle.loads((tmp_path / "file").read_bytes())  # noqa: S301 - to show that the trap works
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut-off")
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), folder, callbacks=[Kill()], **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return cases.weights(runs.train(cases.tiny_llama(), tmp_path_factory.mktemp("whole"), **OPTIONS).model)


@pytest.fixture
def run_folder(cut_off, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(cut_off, folder)
    return folder


def checkpoint(folder):
    (found,) = folder.glob("stage-001-dpo/checkpoint-1")
    return found


def resumed(folder):
    return runs.train(cases.tiny_llama(), folder, resume=True, **OPTIONS)


#: Files of a checkpoint inside a stage that transformers reads, with the error that a planted one raises.
READ = {
    "optimizer.pt": "UnpicklingError",
    "scheduler.pt": "UnpicklingError",
    "rng_state.pth": "UnpicklingError",
    "model.safetensors": "SafetensorError",
    "trainer_state.json": "UnicodeDecodeError|JSONDecodeError",
}
UNREAD = ("training_args.bin", "pytorch_model.bin")


def every_file(names, *unmarked):
    """Each file in each form; those that are not named here are as slow, and alike."""
    return [
        pytest.param(name, form, marks=() if (name, form) in unmarked else slow) for name in names for form in FORMS
    ]


@pytest.mark.parametrize(
    ("name", "form"), every_file([*READ, *UNREAD], ("optimizer.pt", "torch"), ("trainer_state.json", "pickle"))
)
def test_a_checkpoint_with_a_planted_file_is_skipped_and_the_stage_starts_anew(
    name, form, run_folder, marker, whole, caplog
):
    new = not (checkpoint(run_folder) / name).exists()
    malice.plant(checkpoint(run_folder) / name, marker, form)
    with caplog.at_level(logging.WARNING, logger="hbat"):
        run = resumed(run_folder)
    assert not marker.exists()
    assert runs.same(cases.weights(run.model), whole)
    said = [message for message in caplog.messages if "checkpoint-1 is skipped: " in message]
    assert bool(said) != new  # a file that was not there before is nobody's to read
    assert new or name in said[0]


@pytest.mark.parametrize(
    ("name", "form"),
    every_file(READ, ("optimizer.pt", "torch"), ("scheduler.pt", "pickle"), ("rng_state.pth", "torch")),
)
def test_a_planted_file_that_is_sealed_as_well_is_refused_by_transformers_and_named(name, form, run_folder, marker):
    """Checksums keep no attacker away, who can write them anew; `weights_only=True` of transformers does."""
    malice.plant(checkpoint(run_folder) / name, marker, form)
    seal(checkpoint(run_folder))
    expected = rf"checkpoint-1 cannot be resumed from \(({READ[name]}): .*Remove this folder"
    with pytest.raises(RunStateError, match=expected):
        resumed(run_folder)
    assert not marker.exists()


def test_files_that_nobody_needs_are_not_read(run_folder, marker, whole):
    for name in UNREAD:
        malice.plant(checkpoint(run_folder) / name, marker, "torch")
    seal(checkpoint(run_folder))
    assert runs.same(cases.weights(resumed(run_folder).model), whole)
    assert not marker.exists()


def manifests(folder):
    return sorted(folder.glob("hbat_state*.json"))


def rewrite(manifest, change):
    """Change a manifest and write its checksum anew, as somebody would who knows the format."""
    values = json.loads(manifest.read_text(encoding="utf-8"))
    del values["checksum"]
    change(values)
    manifest.write_text(json.dumps(values | {"checksum": digest(values)}), encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_planted_state_is_refused_by_name(form, run_folder, marker):
    for manifest in manifests(run_folder):
        malice.plant(manifest, marker, form)
    with pytest.raises(RunStateError, match=r"hbat_state\.json cannot be read"):
        RunFolder(run_folder).read()
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_planted_tensors_are_refused_by_name(form, run_folder, marker):
    for file in (run_folder / "state").iterdir():
        malice.plant(file, marker, form)
    with pytest.raises(RunStateError, match=r"state/[\w-]+\.safetensors"):
        RunFolder(run_folder).read()
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_planted_tensors_with_their_checksum_in_the_manifest_are_refused_by_name(form, run_folder, marker):
    def trust(values):
        for name in values["checksums"]:
            values["checksums"][name] = checksum(run_folder / "state" / name)

    for file in (run_folder / "state").iterdir():
        malice.plant(file, marker, form)
    for manifest in manifests(run_folder):
        rewrite(manifest, trust)
    folder = RunFolder(run_folder)
    with pytest.raises(RunStateError, match=r"\.safetensors cannot be read"):
        folder.read_tensors(folder.read(), "weights")
    assert not marker.exists()


@pytest.mark.parametrize("form", [pytest.param("pickle", marks=slow), "torch"])
def test_a_planted_log_and_files_that_no_state_names_run_nothing(form, run_folder, marker, whole):
    malice.plant(run_folder / "trainer_state.json", marker, form)
    malice.plant(run_folder / "state" / "extra.safetensors", marker, form)
    try:
        run = resumed(run_folder)
    except RunStateError as error:
        assert "trainer_state.json" in str(error)  # noqa: PT017 - either is safe; an error must name the file
    else:
        assert runs.same(cases.weights(run.model), whole)
    assert not marker.exists()


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../../x.safetensors", "../weights-000.safetensors", "sub/x.safetensors", "absolute"]
)
def test_a_state_that_names_a_file_elsewhere_is_refused_by_that_name(path, run_folder, tmp_path):
    outside = tmp_path / "x.safetensors"
    shutil.copyfile(run_folder / "state" / "weights-000.safetensors", outside)
    path = str(outside) if path == "absolute" else path
    for manifest in manifests(run_folder):
        rewrite(manifest, lambda values: values["files"].update(weights=path))
    with pytest.raises(RunStateError) as caught:
        RunFolder(run_folder).read()
    assert path in str(caught.value)


# --- the command line ------------------------------------------------------------------------------------------------


@slow
def test_the_command_line_resumes_past_planted_files_or_names_them(tmp_path, marker, capfd):
    run_file = run_files.write(tmp_path, run_files.save_model(tmp_path / "model"), **SAVES)
    trainer = build_trainer(parse(run_file))
    kill = Kill()  # to cut it off where a checkpoint is
    for track in trainer.tracks.values():
        track.callbacks.append(kill)
    with pytest.raises(CutOffError):
        trainer.train()
    for name in READ:
        malice.plant(checkpoint(tmp_path / "out") / name, marker, "torch")
    seal(checkpoint(tmp_path / "out"))
    status, lines = run_files.train(run_file, capfd, "--resume")
    assert (status, len(lines)) == (2, 1)
    assert "checkpoint-1 cannot be resumed from" in lines[0]
    malice.plant(checkpoint(tmp_path / "out") / "optimizer.pt", marker, "pickle")
    assert run_files.train(run_file, capfd, "--resume") == (0, [])
    assert not marker.exists()
