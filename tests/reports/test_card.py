"""The model card says what was trained, how, and what came out, in a form that the Hub reads."""

import types

import cases
import pytest
import yaml
from huggingface_hub import ModelCard
from matrices import TWO_ROUNDS, matrix

from hbat.config.hbat import HBATConfig
from hbat.reports.card import write_model_card
from hbat.reports.matrix import markdown_table


def card(folder, model=None, found=None, sources=(), **options):
    config = HBATConfig(output_dir=str(folder), **options)
    write_model_card(folder, config, model or cases.tiny_llama(), found or matrix(), sources=sources)
    text = (folder / "README.md").read_text(encoding="utf-8")
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_the_cards_front_matter_is_yaml_that_names_library_and_objectives(tmp_path):
    front, _ = card(tmp_path)
    assert front == {"library_name": "transformers", "tags": ["hbat", "trl", "sft", "dpo"]}
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == front


def named(name, model=None):
    model = model or cases.tiny_llama()
    model.config._name_or_path = name  # noqa: SLF001 - where transformers keeps it
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


def test_the_card_names_data_of_the_hub_and_no_files(tmp_path):
    front, _ = card(tmp_path, sources=["trl-lib/tldr", "pairs.jsonl", "imdb", "rows.jsonl.gz"])
    assert front["datasets"] == ["trl-lib/tldr", "imdb"]


@pytest.mark.parametrize(
    ("text", "licence"),
    [("---\nlicense: apache-2.0\n---\nA model.", "apache-2.0"), ("A model.", None), ("---\nlicense: [\n---\n", None)],
)
def test_the_card_has_the_licence_that_the_base_models_card_names(tmp_path, text, licence):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(text)
    assert card(tmp_path, named(str(tmp_path / "base")))[0].get("license") == licence
    assert "license" not in card(tmp_path, named("some/model-that-is-not-cached"))[0]


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
    model.config._name_or_path = "some/model"  # noqa: SLF001 - where transformers keeps it
    folder = tmp_path / "my run"
    folder.mkdir()
    _, body = card(folder, model, num_rounds=3, ewc={"strength": 2.5}, end_weight=0.5)
    assert "# my run\n" in body
    assert "Trained from `some/model`" in body
    assert "sft, dpo alternate over 3 rounds" in body
    assert '"strength": 2.5' in body
    assert "end_weight: `0.5`" in body


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


def test_results_are_those_of_the_runs_end_each_under_its_objective(tmp_path):
    data = ModelCard(card_text(tmp_path, found=matrix(*TWO_ROUNDS))).data
    found = {result.dataset_config: (result.metric_type, result.metric_value) for result in data.eval_results}
    end = TWO_ROUNDS[-1][1]
    assert found == {name: ("loss", pytest.approx(end[name], abs=1e-4)) for name in ("sft", "dpo")}


def test_the_card_names_the_folder_that_it_lies_in(tmp_path):
    config = HBATConfig(output_dir=str(tmp_path / "run"), num_rounds=1, ewc={"strength": 0.5})
    (tmp_path / "averaged").mkdir()
    write_model_card(tmp_path / "averaged", config, cases.tiny_llama(), matrix(), 0.5)
    text = (tmp_path / "averaged" / "README.md").read_text(encoding="utf-8")
    assert "# averaged\n" in text
    assert text.count('.from_pretrained("averaged")') == 2
    assert "sft, dpo follow each other." in text
    assert '`{"strength": 0.5, "source": "path"}`' in text


def test_a_run_without_scores_of_its_own_has_no_results(tmp_path):
    earlier = matrix(*TWO_ROUNDS)
    earlier.rows = [row | {"run": "earlier"} for row in earlier.rows]
    assert ModelCard(card_text(tmp_path, found=earlier)).data.eval_results is None


def card_text(folder, **options):
    card(folder, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_measurements_are_no_data_sets(tmp_path):
    found = matrix(*TWO_ROUNDS)
    found.add_column("rouge", "rougeL", "higher")
    found.rows[-1]["scores"] = {**found.rows[-1]["scores"], "rouge": {"rougeL": 0.5}}
    results = {
        each["metrics"][0]["type"]: each["dataset"]["name"]
        for each in card(tmp_path, found=found)[0]["model-index"][0]["results"]
    }
    assert results == {"loss": "evaluation rows of dpo", "rougeL": "rows of `evaluation`"}
