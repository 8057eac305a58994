"""`hbat init` writes a first run file."""

import re

import pytest
from runs import needs_kto

from hbat.cli.build import check_sections, peft_config
from hbat.cli.init import first_run
from hbat.cli.main import main
from hbat.cli.run_file import parse
from hbat.config.hbat import HBATConfig


@pytest.fixture
def written(tmp_path):
    """Write a first run file; returns the run and its text."""

    def write(model="org/model-1B", *, lora=False, **data):
        text = first_run(model, data, lora=lora)
        (tmp_path / "run.yaml").write_text(text)
        return parse(tmp_path / "run.yaml", [("use_cpu", True)]), text

    return write


def test_the_file_is_a_run_with_the_defaults_of_hbat(written):
    run, text = written(dpo=["pairs.jsonl"], sft=["a.jsonl", "b.jsonl.gz"])
    assert (run.model_name_or_path, run.config.output_dir) == ("org/model-1B", "model-1B-hbat")
    assert run.config.objectives == ["sft", "dpo"]
    assert run.datasets == {"sft": ["a.jsonl", "b.jsonl.gz"], "dpo": "pairs.jsonl"}
    assert (run.peft, run.reward_funcs) == (None, None)
    for name in ("num_rounds", "ewc", "on_bad_rows"):
        assert f"\n{name}:" in text
        assert getattr(run.config, name) == getattr(HBATConfig(output_dir="x"), name)
    assert run.config.sft["learning_rate"] == 1e-5
    assert run.config.dpo["learning_rate"] == 5e-7
    assert all(len(line) < 120 for line in text.splitlines())


def test_an_adapter_trains_at_its_own_learning_rates(written):
    pytest.importorskip("peft")
    run, text = written(sft=["a"], dpo=["b"], lora=True)
    assert peft_config(run).r == 16
    assert (run.config.sft["learning_rate"], run.config.dpo["learning_rate"]) == (2e-4, 2e-5)
    assert "# a LoRA adapter" in text


@pytest.mark.parametrize("name", ["sft", "dpo", pytest.param("kto", marks=needs_kto), "ppo", "grpo", "rloo"])
def test_every_objective_has_a_section_that_its_trainer_takes(written, name):
    run, text = written(**{name: ["rows"]})
    assert check_sections(run).keys() == {name}
    assert (run.reward_funcs is not None) == (name in {"ppo", "grpo", "rloo"})
    assert "ewc" not in text  # one objective alone has nothing to forget


def test_names_of_any_form_are_written_as_text(written):
    run, _ = written("./models/a: b/", sft=["no", "x: y", "12", "ä, {b}.jsonl"], dpo=["- a"])
    assert (run.model_name_or_path, run.config.output_dir) == ("./models/a: b/", "a: b-hbat")
    assert run.datasets == {"sft": ["no", "x: y", "12", "ä, {b}.jsonl"], "dpo": "- a"}


# --- the command -----------------------------------------------------------------------------------------------------

WORDS = ["init", "--model", "m", "--sft", "a", "b", "--dpo", "c"]


def test_the_command_prints_the_file_or_writes_a_new_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = first_run("m", {"sft": ["a", "b"], "dpo": ["c"]}, lora=True)
    assert main([*WORDS, "--lora"]) == 0
    assert capsys.readouterr().out == text
    assert main([*WORDS, "--lora", "--output", "run.yaml"]) == 0
    assert capsys.readouterr().out == "Wrote run.yaml. Next: `hbat validate --config run.yaml`.\n"
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_file_that_is_there_is_not_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    assert main([*WORDS, "--output", "run.yaml"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, (tmp_path / "run.yaml").read_text()) == ("", "mine")
    assert captured.err == "hbat: error: `--output` names 'run.yaml', which exists. Give the name of a new file.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "m"], "There is no data. Give one or more of `--sft`, `--dpo`"),
        (["--sft", "a"], "--model"),
        (["--model", "m", "--sft", "a", "--sfd", "b"], "`--sfd` is not an option. See `hbat init --help`."),
    ],
)
def test_what_is_missing_or_unknown_is_named(words, says, capsys):
    assert main(["init", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(r"hbat: error: .*\n$", captured.err)
    assert says in captured.err
