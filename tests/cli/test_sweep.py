"""`hbat sweep`: every combination in a folder of its own, once."""

import json
import signal
import subprocess
import sys
import time

import pytest
import run_files

from hbat.cli import run_file
from hbat.cli import sweep as sweeps
from hbat.cli.main import main
from hbat.state.lock import is_held


@pytest.fixture
def file(tmp_path):
    return run_files.write(tmp_path, run_files.save_model(tmp_path / "model"))


def sweep(file, *words):
    return main(["sweep", str(file), "--eval_datasets.sft", str(file.parent / "sft.jsonl"), *words])


def test_every_combination_trains_once_and_has_its_scores(tmp_path, file, capfd):
    axes = ["--set", "num_rounds=1,2", "--set", "ewc.strength=0.5"]
    # The first one as the sweep would, but without the seconds that another process takes to start.
    first = tmp_path / "out" / "num_rounds=1,ewc.strength=0.5"
    words = ["--eval_datasets.sft", str(file.parent / "sft.jsonl"), "--num_rounds=1", "--ewc.strength=0.5"]
    assert main(["train", "--config", str(file), *words, f"--output_dir={first}"]) == 0
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert sweep(file, *axes) == 0
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    folders = {folder.name: folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()}
    assert set(folders) == {"num_rounds=1,ewc.strength=0.5", "num_rounds=2,ewc.strength=0.5"}
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["keys"] == ["num_rounds", "ewc.strength"]
    assert [row["values"]["num_rounds"] for row in found["rows"]] == [1, 2]
    for row, folder in zip(found["rows"], folders.values(), strict=True):
        own = json.loads(
            (
                tmp_path / "out" / f"num_rounds={row['values']['num_rounds']},ewc.strength=0.5" / "evaluation.json"
            ).read_text()
        )
        assert row["scores"] == own["rows"][-1]["scores"]
        assert (folder / "model.safetensors").is_file()
    assert "sft loss" in capfd.readouterr().out
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sweep(file, *axes, "--sft.learning_rate", "0.5") == 1  # the folders hold other runs
    assert "learning_rate" in capfd.readouterr().err
    trained = {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in folders.items()}
    assert sweep(file, *axes) == 0
    assert trained == {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in folders.items()}


@pytest.mark.slow
def test_a_run_that_fails_ends_the_sweep_with_its_folder(tmp_path, file, capfd):
    assert sweep(file, "--set", "sft.learning_rate=1e30") == 1
    assert "sft.learning_rate=1e+30 failed" in capfd.readouterr().err
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "num_rounds"], "write a key and its values"),
        (["--set", "num_rounds="], "write a key and its values"),
        (["--set", "num_rounds=[1"], "write a key and its values"),
        (["--set", "run_name=a/b,a_b"], "share the folder"),
        (["--set", "num_rounds=1,0"], "`num_rounds` is 0"),
        (["--set", "num_ronds=1,2"], "Did you mean `num_rounds`"),
        (["--set", "num_rounds=1", "--set", "num_rounds=2"], "names a key twice"),
        ([], "--set"),
    ],
)
def test_values_that_cannot_run_are_refused_before_the_first_run(tmp_path, file, capfd, words, message):
    assert sweep(file, *words) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_scores_is_refused(tmp_path, file, capfd):
    words = ["--datasets.sft", f"{{path: {file.parent / 'sft.jsonl'}, columns: {{eval_split: x}}}}"]
    assert main(["sweep", str(file), "--set", "num_rounds=1,2", *words]) == 2
    assert "give the run `eval_datasets`" in capfd.readouterr().err


def test_values_of_any_kind_reach_the_run_as_they_are_written(tmp_path, file, monkeypatch):
    given = []
    monkeypatch.setattr(sweeps, "_train", lambda _, folder, options: given.append((folder.name, options)))
    axes = ["--set", "run_name=2026-01-31", "--set", "sft.save_strategy=no", "--set", "peft={r: 2}"]
    assert sweep(file, *axes) == 2  # as nothing was trained
    ((name, options),) = given
    assert name == "run_name=2026-01-31,sft.save_strategy=no,peft=__r___2_"
    run = run_file.parse(file, run_file.parse_overrides(options))
    assert (run.config.run_name, run.config.sft["save_strategy"], run.peft) == ("2026-01-31", "no", {"r": 2})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_a_run_that_resumes(tmp_path, file, number):
    words = ["--set", "ewc.strength=0.5", "--sft.max_steps", "100000", "--sft.save_steps", "100000"]
    words += ["--eval_datasets.sft", str(file.parent / "sft.jsonl")]
    command = [sys.executable, "-m", "hbat", "sweep", str(file), *words]
    folder = tmp_path / "out" / "ewc.strength=0.5"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while "sft: " not in (folder / "progress.json").read_text() if (folder / "progress.json").exists() else True:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert not is_held(folder)  # nothing trains any more
    assert list(folder.glob("stage-*/checkpoint-*/hbat_checksums.json"))
