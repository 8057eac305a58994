"""`hbat sweep`: every combination in a folder of its own, once."""

import json

import pytest
import run_files

from hbat.cli.main import main


@pytest.fixture
def file(tmp_path):
    return run_files.write(tmp_path, run_files.save_model(tmp_path / "model"))


def sweep(file, *words):
    return main(["sweep", str(file), "--eval_datasets.sft", str(file.parent / "sft.jsonl"), *words])


def test_every_combination_trains_once_and_has_its_scores(tmp_path, file, capfd):
    axes = ["--set", "num_rounds=1,2", "--set", "ewc.strength=0.5"]
    assert sweep(file, *axes) == 0
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
    trained = {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in folders.items()}
    assert sweep(file, *axes) == 0
    assert trained == {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in folders.items()}


def test_a_run_that_fails_ends_the_sweep_with_its_folder(tmp_path, file, capfd):
    assert sweep(file, "--set", "sft.learning_rate=1e30") == 1
    assert "sft.learning_rate=1e30 failed" in capfd.readouterr().err
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "num_rounds"], "write a key and its values"),
        (["--set", "num_rounds="], "write a key and its values"),
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
