"""The log comes back entry by entry or not at all."""

import json

import pytest
from faults import every_damage
from transformers import TrainerState

from hbat.reports.files import LOG_FILE
from hbat.reports.log import load_log, save_log

ENTRIES = [{"sft/loss": 0.1 * step, "step": step} for step in range(6)]


def saved(folder, count=4):
    """A log of which the first entries are vouched for, as by a run that was cut off later."""
    remembered = save_log(folder, TrainerState(log_history=ENTRIES[:count], is_world_process_zero=True))
    save_log(folder, TrainerState(log_history=ENTRIES, is_world_process_zero=True, epoch=3.0, max_steps=40))
    return remembered


def test_what_a_state_vouches_for_comes_back_and_no_more(tmp_path, caplog):
    remembered = saved(tmp_path)
    assert remembered["entries"] == 4
    assert json.loads(json.dumps(remembered)) == remembered
    again = load_log(tmp_path, 3, remembered)
    assert again == TrainerState(log_history=ENTRIES[:4], global_step=3)
    assert TrainerState.load_from_json(str(tmp_path / LOG_FILE)).log_history == ENTRIES  # as transformers reads it
    assert not caplog.records


def test_a_run_that_has_logged_nothing_begins_with_an_empty_log_whatever_lies_there(tmp_path, caplog):
    saved(tmp_path)
    for expected in ({}, {"entries": 0, "checksum": "x"}):
        assert load_log(tmp_path, 0, expected).log_history == []
    assert load_log(tmp_path / "absent", 0, {}).log_history == []
    assert not caplog.records


@every_damage
def test_a_damaged_log_is_named_put_aside_and_begun_anew(damage, tmp_path, caplog):
    remembered = saved(tmp_path, 6)
    damage(tmp_path / LOG_FILE)
    lies = (tmp_path / LOG_FILE).exists()
    state = load_log(tmp_path, 5, remembered)
    assert (state.log_history, state.global_step) == ([], 5)
    (warning,) = caplog.records
    assert f"The log {tmp_path / LOG_FILE} is damaged (it" in warning.getMessage()
    assert "is resumed with an empty log" in warning.getMessage()
    assert (tmp_path / "trainer_state.damaged.json").exists() is lies
    assert ("trainer_state.damaged.json" in warning.getMessage()) is lies
    assert not (tmp_path / LOG_FILE).exists()


@pytest.mark.parametrize(
    "text",
    ["", '{"log_history": [', "[]", '{"unknown": 1}', "null", '{"log_history": 3}', '{"log_history": [3, 4, 5, 6]}'],
)
def test_what_is_no_log_is_begun_anew(text, tmp_path, caplog):
    remembered = saved(tmp_path)
    (tmp_path / LOG_FILE).write_text(text)
    assert load_log(tmp_path, 0, remembered).log_history == []
    assert len(caplog.records) == 1


def test_an_entry_that_was_changed_is_noticed_and_one_after_those_vouched_for_is_of_no_matter(tmp_path):
    remembered = saved(tmp_path)
    values = json.loads((tmp_path / LOG_FILE).read_text())
    values["log_history"][4]["sft/loss"] = 77
    (tmp_path / LOG_FILE).write_text(json.dumps(values))
    assert load_log(tmp_path, 3, remembered).log_history == ENTRIES[:4]
    values["log_history"][3]["sft/loss"] = 77
    (tmp_path / LOG_FILE).write_text(json.dumps(values))
    assert load_log(tmp_path, 3, remembered).log_history == []


def test_another_process_than_the_main_one_moves_nothing(tmp_path, monkeypatch):
    remembered = saved(tmp_path)
    (tmp_path / LOG_FILE).write_text("{}")
    monkeypatch.setenv("RANK", "1")
    assert load_log(tmp_path, 0, remembered).log_history == []
    assert (tmp_path / LOG_FILE).read_text() == "{}"
