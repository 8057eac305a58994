import json
import types

import cases
import pytest
import yaml
from matrices import TWO_ROUNDS, matrix

from hbat.config.hbat import HBATConfig
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.results import directions, markdown_table, table_rows, write_model_card, write_results


def card(folder, model=None, found=None, **options):
    config = HBATConfig(output_dir=str(folder), **options)
    write_model_card(folder, config, model or cases.tiny_llama(), found or matrix())
    text = (folder / "README.md").read_text(encoding="utf-8")
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


# --- table -----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_row_and_one_for_backward_transfer():
    assert markdown_table(matrix(*TWO_ROUNDS)).splitlines() == [
        "| after | sft loss | dpo loss |",
        "|---|---:|---:|",
        "| start | 4.0000 | 0.7000 |",
        "| round 1: sft | 2.0000 | 0.9000 |",
        "| round 1: dpo | 2.5000 | 0.4000 |",
        "| round 2: sft | 1.0000 | 0.5000 |",
        "| round 2: dpo | 1.7500 | 0.2500 |",
        "| backward transfer | -0.2500 | +0.1500 |",
    ]


def test_cells_are_texts_and_as_many_in_every_row():
    head, rows = table_rows(matrix(*TWO_ROUNDS))
    assert head == ["after", "sft loss", "dpo loss"]
    assert rows[0] == ["start", "4.0000", "0.7000"]
    assert rows[-1] == ["backward transfer", "-0.2500", "+0.1500"]
    assert {len(each) for each in rows} == {3}


def test_missing_scores_are_empty_cells():
    lines = markdown_table(matrix(("sft", {"sft": 1.0}), ("dpo", {"dpo": 2.0}))).splitlines()
    assert lines[2:] == [
        "| round 1: sft | 1.0000 |  |",
        "| round 1: dpo |  | 2.0000 |",
        "| backward transfer |  |  |",
    ]


@pytest.mark.parametrize("rows", [[], TWO_ROUNDS[:1], TWO_ROUNDS[:2], TWO_ROUNDS])
def test_every_line_has_as_many_cells_as_the_head(rows):
    counts = {line.count("|") for line in markdown_table(matrix(*rows)).splitlines()}
    assert counts == {4}


def test_words_say_which_scores_are_better():
    assert directions(matrix()) == "lower is better"
    headline = {"ppo": "reward"}
    assert directions(ForgettingMatrix(headline, better={"ppo": "higher"})) == "higher is better"
    headline = {"sft": "loss", "ppo": "reward", "dpo": "loss"}
    mixed = ForgettingMatrix(headline, better={"ppo": "higher"})
    assert directions(mixed) == "lower is better for sft and dpo, higher is better for ppo"


# --- files -----------------------------------------------------------------------------------------------------------


def test_results_are_written_as_json(tmp_path):
    found = matrix(*TWO_ROUNDS)
    write_results(tmp_path, found)
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == found.as_dict()


def test_later_results_replace_earlier_ones_and_leave_nothing_behind(tmp_path):
    write_results(tmp_path, matrix(*TWO_ROUNDS[:2]))
    write_results(tmp_path, matrix(*TWO_ROUNDS))
    assert len(json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["rows"]) == 5
    assert {each.suffix for each in tmp_path.iterdir()} <= {".json", ".png"}


# --- model card ------------------------------------------------------------------------------------------------------


def test_the_cards_front_matter_is_yaml_that_names_library_and_objectives(tmp_path):
    front, _ = card(tmp_path)
    assert front == {"library_name": "transformers", "tags": ["hbat", "trl", "sft", "dpo"]}


def named(name, model=None):
    model = model or cases.tiny_llama()
    model.config._name_or_path = name  # noqa: SLF001 - the host's own place for it
    return model


@pytest.mark.parametrize("name", ["some/model-1.5_B", "gpt2", "1.0"])
def test_the_card_names_the_base_model_for_the_hub(name, tmp_path):
    front, _ = card(tmp_path, named(name))
    assert front == {"library_name": "transformers", "base_model": name, "tags": ["hbat", "trl", "sft", "dpo"]}


@pytest.mark.parametrize("name", ["", "/models/llama", "./llama", "~/llama", "a/b/c", "C:\\llama", 'no: "yes"'])
def test_a_folder_is_no_base_model_for_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(tmp_path, named(name))[0]
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert "base_model" not in card(tmp_path, named("models/llama"))[0]


def test_an_adapter_belongs_to_peft_and_names_its_base(tmp_path):
    pytest.importorskip("peft")
    front, _ = card(tmp_path, named("some/model", cases.lora_llama()))
    tags = ["hbat", "trl", "sft", "dpo", "peft"]
    assert front == {"library_name": "peft", "base_model": "some/model", "tags": tags}


def test_names_that_mean_something_in_yaml_stay_texts(tmp_path):
    odd = types.SimpleNamespace(name='no: "yes", - #')
    front, _ = card(tmp_path, objectives=["sft", odd])
    assert front["tags"] == ["hbat", "trl", "sft", 'no: "yes", - #']


def test_the_card_says_what_was_trained_from_what_and_how(tmp_path):
    model = cases.tiny_llama()
    model.config._name_or_path = "some/model"  # noqa: SLF001 - the host's own place for it
    folder = tmp_path / "my run"
    folder.mkdir()
    _, body = card(folder, model, num_rounds=3, ewc={"f_max": 2.5}, end_weight={"dpo": 0.5})
    assert "# my run\n" in body
    assert "Trained from `some/model`" in body
    assert "sft, dpo alternate over 3 rounds" in body
    assert '"f_max": 2.5' in body
    assert "end_weight: `{'dpo': 0.5}`" in body


def test_a_model_given_in_memory_and_a_run_without_consolidation_are_said_so(tmp_path):
    _, body = card(tmp_path, ewc=None)
    assert "Trained from `a model given in memory`" in body
    assert "elastic weight consolidation: `none`" in body


def test_scores_stand_in_the_card_where_there_are_any(tmp_path):
    found = matrix(*TWO_ROUNDS)
    _, body = card(tmp_path, found=found)
    assert markdown_table(found) in body
    assert "Lower is better. The reference" in body
    _, body = card(tmp_path)
    assert "Scores" not in body
