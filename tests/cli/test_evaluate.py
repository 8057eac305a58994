"""`hbat eval`: models, adapters and runs side by side."""

import json
import subprocess
import sys
import time

import cases
import judge_server
import pytest
import run_files
import runs

from hbat.cli.main import main
from hbat.state.lock import locked

ROWS = [{"prompt": f"{number} plus 1 is", "completion": f" {number + 1}"} for number in range(3)]


def hbat(*words):
    return main([str(word) for word in words])


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_files.write_rows(tmp_path / "prompts.jsonl", ROWS)
    (tmp_path / "eval.yaml").write_text("prompts: prompts.jsonl\nmax_new_tokens: 4\ntexts: texts.txt\n")
    (tmp_path / "texts.txt").write_text("one line\nanother line\n")
    for seed, name in enumerate(["base", "other"]):
        run_files.save_model(tmp_path / name, seed)
    return tmp_path


def test_models_are_measured_side_by_side(files, capsys):
    assert hbat("eval", "base", "other", "--config", "eval.yaml") == 0
    found = json.loads((files / "evaluation" / "evaluation.json").read_text())
    assert found["counts"] == {"completions": 3, "texts": 2}
    assert list(found["models"]) == ["base", "other"]
    assert found["models"]["base"]["texts"]["loss"] != found["models"]["other"]["texts"]["loss"]
    printed = capsys.readouterr().out
    assert "3 prompts, 2 texts, 95 % intervals" in printed
    assert "rouge rougeL (higher is better)" in printed
    assert (files / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len((files / "evaluation" / "base" / "completions.jsonl").read_text().splitlines()) == 3


def test_options_of_the_command_line_come_before_those_of_the_file(files, capsys):
    assert (
        hbat("eval", "base", "--config", "eval.yaml", "--temperatures", "[0,1.5]", "--samples=2", "--texts", "null")
        == 0
    )
    found = json.loads((files / "evaluation" / "evaluation.json").read_text())["models"]["base"]
    assert set(found) == {"completions@0", "completions@1.5", "rouge@0", "rouge@1.5"}
    assert len((files / "evaluation" / "base" / "completions.jsonl").read_text().splitlines()) == 3 + 6


def test_an_adapter_is_measured_on_its_base(files):
    model = cases.lora_llama()
    model.get_base_model().save_pretrained(files / "below")
    cases.tiny_tokenizer().save_pretrained(files / "below")
    model.peft_config["default"].base_model_name_or_path = str(files / "below")
    model.save_pretrained(files / "adapter")
    assert hbat("eval", "below", "adapter", "--texts", "texts.txt") == 0
    found = json.loads((files / "evaluation" / "evaluation.json").read_text())["models"]
    assert found["below"]["texts"]["loss"] != found["adapter"]["texts"]["loss"]


def test_a_run_is_measured_by_its_folder_once_it_has_saved_a_model(files, capsys):
    run = runs.train(cases.tiny_llama(), files / "run", num_rounds=1)
    assert hbat("eval", "run", "--texts", "texts.txt") == 2
    assert "holds neither a model nor an adapter" in capsys.readouterr().err
    run.save_model()
    assert hbat("eval", "run", "--texts", "texts.txt") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "Nothing is measured"),
        (["absent", "--texts", "texts.txt"], "'absent' cannot be loaded"),
        (["base", "base", "--texts", "texts.txt"], "named twice"),
        (["base", "--text", "texts.txt"], "`--text` is not an option. Did you mean `texts`?"),
        (["--texts", "texts.txt", "base"], "takes the models first"),
        (["never.yaml", "--texts", "texts.txt"], "holds neither a model nor an adapter"),
        (["base", "--texts", "texts.txt", "--output_dir", "held"], "holds a run, with scores of its own"),
        (["base", "--config", "none.yaml"], "none.yaml"),
        (["base", "--config", "never.yaml"], "never.yaml is a run file"),
        (["eval.yaml", "--texts", "texts.txt"], "eval.yaml is no run file"),
        (
            ["base", "--config", "eval.yaml", "--judge.model", "m", "--judge.api_key_env", "HBAT_UNSET"],
            "has no HBAT_UNSET",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(files, capsys, words, message):
    (files / "never.yaml").write_text("model_name_or_path: x\noutput_dir: never\ndatasets: {sft: a, dpo: b}\n")
    (files / "never").mkdir()
    (files / "held").mkdir()
    (files / "held" / "hbat_state.json").write_text("{}")
    assert hbat("eval", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hbat: error")]
    assert message in line


def test_models_of_one_name_are_told_apart_by_their_folders(files):
    for name in ("a", "b"):
        run_files.save_model(files / name / "model")
    assert hbat("eval", "a/model", "b/model", "--texts", "texts.txt") == 0
    assert set(json.loads((files / "evaluation" / "evaluation.json").read_text())["models"]) == {"a-model", "b-model"}


def test_other_models_and_measurements_join_those_before(files):
    def models(*words):
        assert hbat("eval", *words) == 0
        found = json.loads((files / "evaluation" / "evaluation.json").read_text())["models"]
        return {label: set(scores) for label, scores in found.items()}

    assert models("base", "--texts", "texts.txt") == {"base": {"texts"}}
    assert models("other", "--texts", "texts.txt") == {"base": {"texts"}, "other": {"texts"}}
    words = ["--prompts", "prompts.jsonl", "--max_new_tokens", 4]
    assert models("base", *words) == {"base": {"texts", "completions", "rouge"}, "other": {"texts"}}
    # Scores of other texts do not stand beside those of these.
    assert models("base", "--texts", "texts.txt", "--max_length", 5) == {"base": {"texts", "completions", "rouge"}}


def test_other_weights_and_dtypes_are_other_models(files, capsys):
    words = ["eval", "base", "--prompts", "prompts.jsonl", "--max_new_tokens", 4]
    assert hbat(*words) == 0
    assert hbat(*words, "--model_init_kwargs.dtype", "bfloat16") == 2
    assert "another `model`" in capsys.readouterr().err
    cases.tiny_llama(5).save_pretrained(files / "base")
    assert hbat(*words) == 2
    assert "another `model`" in capsys.readouterr().err


def test_two_adapters_whose_base_has_their_name_are_told_apart(files, capsys):
    for seed, folder in enumerate(["one", "two"]):
        model = cases.lora_llama(seed)
        model.peft_config["default"].base_model_name_or_path = str(files / "base")
        (files / folder).mkdir()
        model.save_pretrained(files / folder / "base")
    words = ["--prompts", "prompts.jsonl", "--max_new_tokens", 4]
    assert hbat("eval", "one/base", *words) == 0
    assert hbat("eval", "two/base", *words) == 2
    assert "another `model`" in capsys.readouterr().err


def test_the_folder_where_one_is_can_be_named(files, monkeypatch, capsys):
    monkeypatch.chdir(run_files.save_model(files / "lora[x]"))
    assert hbat("eval", ".", "--texts", "../texts.txt", "--output_dir", "../out") == 0
    assert "lora[x]" in capsys.readouterr().out


def test_two_processes_do_not_measure_in_one_folder(files, capsys):
    with locked(files / "evaluation"):
        assert hbat("eval", "base", "--texts", "texts.txt") == 2
    assert "Another process" in capsys.readouterr().err


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_without_a_question_asked_twice(files):
    with judge_server.judge(judge_server.biased, faults=["slow"] * 2) as server:
        words = ["--prompts", "prompts.jsonl", "--max_new_tokens", "4", "--judge.model", "m", "--judge.parallel", "1"]
        command = [sys.executable, "-m", "hbat", "eval", "base", *words, "--judge.base_url", server.url]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while len(server.asked) < 3:
                time.sleep(0.01)
            process.kill()
        kept = len((files / "evaluation" / "judgments.jsonl").read_text().splitlines())
        before = server.asked[:kept]
        assert kept >= 2
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert [server.asked.count(question) for question in before] == [1] * kept
