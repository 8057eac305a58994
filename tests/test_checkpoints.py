"""From which checkpoint of the host a stage goes on."""

import pytest

from hbat.checkpoints import last_checkpoint


def checkpoint(folder, step, *, whole=True):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json") if whole else ():
        (folder / f"checkpoint-{step}" / name).write_text("", encoding="utf-8")


@pytest.mark.parametrize(("max_steps", "expected"), [(-1, 10), (12, 10), (10, None), (9, None)])
def test_a_stage_goes_on_from_its_newest_whole_checkpoint_unless_that_is_its_end(max_steps, expected, tmp_path):
    for step in (2, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    found = last_checkpoint(tmp_path, max_steps)
    assert found == (expected and str(tmp_path / f"checkpoint-{expected}"))


def test_a_stage_without_checkpoints_starts_anew(tmp_path):
    assert last_checkpoint(tmp_path / "absent", 4) is None


def test_a_stage_goes_on_from_the_newest_checkpoint_that_its_objective_can_go_on_from(tmp_path):
    for step in (2, 4, 5):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path, -1, lambda step: step % 2 == 0) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path, -1, lambda step: step > 5) is None
    assert last_checkpoint(tmp_path, 5, lambda step: step % 2 == 0) is None
