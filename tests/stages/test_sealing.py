"""Checkpoints are sealed when all of their files are there."""

import types

import pytest
from faults import Faults, full_disk

from hbat.stages import checkpoints as sealing
from hbat.stages.checkpoints import SEAL, SealCheckpoints, last_checkpoint
from hbat.state.files import StorageError


def save(folder, step=3):
    SealCheckpoints().on_save(
        types.SimpleNamespace(output_dir=str(folder)), types.SimpleNamespace(global_step=step), None
    )


@pytest.fixture
def checkpoint(tmp_path):
    made = tmp_path / "checkpoint-3"
    made.mkdir()
    for name in ("optimizer.pt", "trainer_state.json"):
        (made / name).write_text(name)
    return made


def test_a_checkpoint_is_sealed_after_the_files_of_all_processes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "wait_for_everyone", lambda: (checkpoint / "rng_state_1.pth").write_text("late"))
    save(tmp_path)
    assert "rng_state_1.pth" in (checkpoint / SEAL).read_text()
    assert last_checkpoint(tmp_path, -1) == str(checkpoint)


def test_only_the_main_process_seals_but_all_wait(checkpoint, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(sealing, "wait_for_everyone", lambda: waited.append(1))
    monkeypatch.setenv("RANK", "1")
    save(tmp_path)
    assert waited == [1]
    assert not (checkpoint / SEAL).exists()


def test_a_save_that_left_no_checkpoint_is_none_to_seal(tmp_path):
    save(tmp_path, 7)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_no_seal(checkpoint, tmp_path, monkeypatch):
    Faults(monkeypatch, at=1, raises=full_disk, only=("write",))
    with pytest.raises(StorageError, match=rf"checkpoint-3/{SEAL} \(\d+ bytes\) cannot be written"):
        save(tmp_path)
    assert sorted(each.name for each in checkpoint.iterdir()) == ["optimizer.pt", "trainer_state.json"]
