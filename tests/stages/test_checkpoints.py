"""From which of its checkpoints a stage resumes."""

import json

import pytest
from faults import every_damage

from hbat.stages.checkpoints import SEAL, last_checkpoint, seal

NAMES = ("optimizer.pt", "trainer_state.json", "nested/model.safetensors", "rng_state_1.pth")


def checkpoint(folder, step, *, whole=True, sealed=True):
    made = folder / f"checkpoint-{step}"
    (made / "nested").mkdir(parents=True)
    for name in NAMES if whole else ():
        (made / name).write_bytes(f"{name} at {step}".encode() * 20)
    if sealed:
        seal(made)
    return made


@pytest.mark.parametrize(("max_steps", "expected"), [(-1, 10), (12, 10), (10, None), (9, None)])
def test_a_stage_resumes_from_its_newest_whole_checkpoint_unless_that_is_its_end(max_steps, expected, tmp_path):
    for step in (2, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, whole=False, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    found = last_checkpoint(tmp_path, max_steps)
    assert found == (expected and str(tmp_path / f"checkpoint-{expected}"))


def test_a_stage_without_checkpoints_starts_anew(tmp_path):
    assert last_checkpoint(tmp_path / "absent", 4) is None


def test_a_stage_resumes_from_the_newest_checkpoint_that_its_objective_can_resume_from(tmp_path):
    for step in (2, 4, 5):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path, -1, lambda step: step % 2 == 0) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path, -1, lambda step: step > 5) is None
    assert last_checkpoint(tmp_path, 5, lambda step: step % 2 == 0) is None


def test_a_checkpoint_that_is_what_was_written_is_resumed_from_silently(tmp_path, caplog):
    made = checkpoint(tmp_path, 3)
    assert set(json.loads((made / SEAL).read_text())["files"]) == set(NAMES)
    (made / "added-later").touch()
    assert last_checkpoint(tmp_path, -1) == str(made)
    assert not caplog.records


@every_damage
@pytest.mark.parametrize("name", [*NAMES, SEAL])
def test_a_damaged_checkpoint_is_skipped_and_its_file_named(name, damage, tmp_path, caplog):
    checkpoint(tmp_path, 2)
    damage(checkpoint(tmp_path, 4) / name)
    assert last_checkpoint(tmp_path, -1) == str(tmp_path / "checkpoint-2")
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"{tmp_path / 'checkpoint-4'} is skipped: ")
    assert "The stage resumes from an older checkpoint or starts again." in warning.getMessage()
    assert f": {name} " in warning.getMessage()
    assert (tmp_path / "checkpoint-4").is_dir()
    damage(tmp_path / "checkpoint-2" / name)
    assert last_checkpoint(tmp_path, -1) is None


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '{"files": {}}', '{"files": 3, "checksum": ""}', '{"files": {}, "checksum": ""}', "{"]
)
def test_a_seal_that_is_none_seals_nothing(text, tmp_path, caplog):
    (checkpoint(tmp_path, 4) / SEAL).write_text(text)
    assert last_checkpoint(tmp_path, -1) is None
    assert f"{SEAL} " in caplog.text


def test_a_checkpoint_that_was_cut_off_before_its_seal_is_skipped(tmp_path, caplog):
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4, sealed=False)
    assert last_checkpoint(tmp_path, -1) == str(tmp_path / "checkpoint-2")
    assert f"{SEAL} is missing, so it was cut off while it was written" in caplog.text


def test_a_checkpoint_written_over_another_has_no_seal_until_its_own(tmp_path, monkeypatch):
    made = checkpoint(tmp_path, 4)
    (made / "optimizer.pt").write_bytes(b"new")
    assert last_checkpoint(tmp_path, -1) is None
    monkeypatch.setattr("hbat.stages.checkpoints.checksum", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seal(made)
    assert not (made / SEAL).exists()
    monkeypatch.undo()
    seal(made)
    assert last_checkpoint(tmp_path, -1) == str(made)


def test_a_checkpoint_of_the_model_alone_is_passed_over_without_a_word(tmp_path, caplog):
    made = checkpoint(tmp_path, 4, sealed=False)
    (made / "optimizer.pt").unlink()
    seal(made)
    assert last_checkpoint(tmp_path, -1) is None
    assert not caplog.records
