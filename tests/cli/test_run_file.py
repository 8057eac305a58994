import dataclasses
import os

import pytest

from hbat.cli.run_file import described_keys, parse, parse_overrides
from hbat.cli.yaml import PlainYAMLError, load_yaml, read_yaml
from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig

MINIMAL = """
model_name_or_path: model
output_dir: out
datasets: {sft: a.jsonl, dpo: b.jsonl}
"""


@pytest.fixture
def run_file(tmp_path):
    def write(text=""):
        file = tmp_path / "run.yaml"
        file.write_text(MINIMAL + text)
        return file

    return write


def parsed(file, *words):
    return parse(file, parse_overrides(words))


def refusal(*args, **kwargs):
    with pytest.raises((ValueError, TypeError)) as caught:
        parsed(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", ".00001", "1.e-5"])
def test_a_number_in_scientific_notation_is_a_number(text):
    assert load_yaml(text) == pytest.approx(1e-5)
    assert isinstance(load_yaml(text), float)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("1.2.3", "1.2.3"),
        ("[sft, dpo]", ["sft", "dpo"]),
        ("{path: x, split: train}", {"path": "x", "split": "train"}),
        (".inf", float("inf")),
        ("e5", "e5"),
    ],
)
def test_values_are_read_as_yaml_1_2_reads_them(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "line 1"),
        ("a: 1\nb: 2\na: 3", "duplicate key `a`, line 3"),
        ("!!python/object/apply:os.getcwd []", "`!!python/object/apply:os.getcwd` is not a plain value"),
        ("a: 1\n---\nb: 2", "another document"),
        ("\x00", "special characters"),
    ],
)
def test_text_that_is_no_plain_yaml_is_refused_in_one_line(text, part):
    with pytest.raises(PlainYAMLError) as caught:
        load_yaml(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_can_take_over_another_with_a_merge_key(run_file):
    run = parse(run_file("sft: &shared {max_length: 9, seed: 1}\ndpo: {<<: *shared, seed: 2}"))
    assert run.config.dpo == {"max_length": 9, "seed": 2}


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    for content, part in [(b"", "is empty"), (b"# only this\n", "is empty"), (b"- a\n", "contains a list")]:
        file.write_bytes(content)
        with pytest.raises(PlainYAMLError, match=part):
            read_yaml(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PlainYAMLError, match="is not UTF-8"):
        read_yaml(file)
    with pytest.raises(PlainYAMLError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_missing_file_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlainYAMLError, match=str(tmp_path / "none.yaml")):
        read_yaml("none.yaml")


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_read_in_every_form():
    words = "--sft.learning_rate 1e-5 --num-rounds=2 --disable_tqdm --ewc null --objectives [sft,dpo] --sft.seed -1"
    assert parse_overrides(words.split()) == [
        ("sft.learning_rate", 1e-5),
        ("num_rounds", 2),
        ("disable_tqdm", True),
        ("ewc", None),
        ("objectives", ["sft", "dpo"]),
        ("sft.seed", -1),
    ]


def test_an_override_takes_precedence_over_the_file_and_a_later_one_over_an_earlier_one(run_file):
    file = run_file("num_rounds: 3\nsft: {learning_rate: 2e-5, max_length: 7}")
    run = parsed(file, "--num_rounds", "5", "--sft.learning_rate", "1e-3", "--num_rounds", "6")
    assert run.config.num_rounds == 6
    assert run.config.sft == {"learning_rate": 1e-3, "max_length": 7}


def test_numbers_from_the_file_and_from_the_command_line_have_the_same_type(run_file):
    file = run_file("ewc: {strength: 1e1}\nsft: {learning_rate: 1e-5}\nend_weight: 5e-1")
    for run in (
        parsed(file),
        parsed(file, "--ewc.strength", "1e1", "--sft.learning_rate=1e-5", "--end_weight", "5e-1"),
    ):
        assert (run.config.ewc.strength, run.config.sft, run.config.end_weight) == (10.0, {"learning_rate": 1e-5}, 0.5)
        assert isinstance(run.config.ewc.strength, float)


def test_an_override_makes_the_section_that_is_not_there(run_file):
    assert parsed(run_file("ewc: null"), "--ewc.strength", "3").config.ewc.strength == 3.0
    assert parsed(run_file(), "--dpo.beta", "0.2").config.dpo == {"beta": 0.2}
    assert parsed(run_file(), "--datasets.dpo", "c.jsonl").datasets == {"sft": "a.jsonl", "dpo": "c.jsonl"}
    run = parsed(run_file(), "--datasets.dpo=null", "--datasets.dpo.path=c")
    assert run.datasets == {"sft": "a.jsonl", "dpo": {"path": "c"}}


def test_reward_functions_are_one_text_or_several(run_file):
    assert parsed(run_file("reward_funcs: rewards.py:length")).reward_funcs == "rewards.py:length"
    assert parsed(run_file(), "--reward_funcs", "rewards.py:length").reward_funcs == "rewards.py:length"
    found = parsed(run_file(), "--reward_funcs", "[rewards.py:length, some/model]").reward_funcs
    assert found == ["rewards.py:length", "some/model"]
    assert parsed(run_file()).reward_funcs is None


def test_consolidation_is_switched_off_by_null(run_file):
    assert parse(run_file("ewc: null")).config.ewc is None
    assert parsed(run_file("ewc: {strength: 2}"), "--ewc", "null").config.ewc is None
    assert parse(run_file()).config.ewc == EWCConfig()


def test_a_section_of_a_repeated_objective_becomes_its_arguments(run_file):
    file = run_file("objectives: [sft, dpo, sft]\nsft_2: {max_steps: 3}")
    run = parse(file, [("datasets.sft_2", "c.jsonl")])
    assert run.config.objectives[2] == {"name": "sft_2", "trainer": "sft", "args": {"max_steps": 3}}
    assert run.datasets["sft_2"] == "c.jsonl"
    run = parsed(file, "--datasets.sft_2", "c.jsonl", "--sft-2.max_steps", "4")
    assert run.config.objectives[2]["args"] == {"max_steps": 4}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "parts"),
    [
        ("num_round: 2", "", ["`num_round`", "`num_rounds`"]),
        ("eval_dataset: {}", "", ["`eval_dataset`", "`eval_datasets`"]),
        ("config: {}", "", ["`config` is not an option"]),
        ("", "--num_round 2", ["`--num_round`", "`num_rounds`"]),
        ("", "--sfd.learning_rate 1", ["`--sfd.learning_rate`", "`sft`"]),
        ("", "stray", ["`stray` belongs to no option"]),
        ("", "--datasets.sft a.jsonl b.jsonl", ["`b.jsonl` belongs to no option"]),
        ("", "--run_name [x", ["`--run_name` is '[x'", "not YAML"]),
        ("", "--datasets.sft.path x", ["`--datasets.sft.path`", "`datasets.sft` is 'a.jsonl'"]),
        ("", "--model_name_or_path null", ["`model_name_or_path` is missing"]),
        ("", "--output_dir=", ["`output_dir` is missing"]),
        ("", "--datasets null", ["`datasets` is missing"]),
        ("", "--datasets.dpo null", ["`datasets.dpo` is missing"]),
        ("", "--datasets [a.jsonl]", ["`datasets`", "a mapping"]),
        ("", "--objectives [sft]", ["`datasets.dpo` has no objective"]),
        ("", "--objectives [sft,dop]", ["`objectives` names 'dop'", "Did you mean `dpo`?"]),
        ("eval_datasets: {dp: x.jsonl}", "", ["`eval_datasets.dp`", "`dpo`"]),
        ("num_rounds: two", "", ["`num_rounds`", "an integer"]),
        ("num_rounds: 0", "", ["`num_rounds` is 0"]),
        ("ewc: {strenght: 3}", "", ["`ewc.strenght`", "`strength`"]),
        ("ewc: {strength: strong}", "", ["`ewc.strength`", "a number"]),
        ("ewc: true", "", ["`ewc` is True", "a mapping or null"]),
        ("sft: 3", "", ["`sft` is 3", "a mapping or null"]),
        ("grpo: 3", "", ["`grpo` is 3", "a mapping or null"]),
        ("ppo_backend: mine", "", ["`ppo_backend` is 'mine'", "'trl'"]),
        ("reward_funcs: 3", "", ["`reward_funcs` is 3", "a string or a list or null"]),
        ("reward_funcs: [3]", "", ["`reward_funcs` is [3]", "a string or a list or null"]),
        ("peft: 16", "", ["`peft`", "a mapping"]),
        ("env: {A: [1]}", "", ["`env.A`"]),
        ("optimizer_state: keep", "", ["`optimizer_state`", "'carry'"]),
        ("objectives: [sft, dpo, sft]", "", ["`datasets.sft_2` is missing"]),
        ("objectives: [sft, dpo, sft]\nsft_2: 3", "", ["`sft_2` is 3", "a mapping or null"]),
        (
            "objectives: [sft, dpo, {name: code, trainer: sft, args: {}}]\ncode: {}",
            "",
            ["`code` is a section, and its entry in `objectives` has `args` too"],
        ),
    ],
)
def test_a_key_or_value_that_cannot_be_used_is_named(run_file, text, words, parts):
    message = refusal(run_file(text), *words.split())
    for part in parts:
        assert part in message


def test_environment_variables_are_set_as_text(run_file, monkeypatch):
    monkeypatch.setenv("HBAT_TEST_A", "old")
    monkeypatch.setenv("HBAT_TEST_B", "old")
    run = parse(run_file("env: {HBAT_TEST_A: 3, HBAT_TEST_B: x}"))
    assert os.environ["HBAT_TEST_A"] == "old"
    run.set_environment()
    assert (os.environ["HBAT_TEST_A"], os.environ["HBAT_TEST_B"]) == ("3", "x")


def test_every_key_has_its_help():
    assert all(field.metadata["help"] for field in described_keys())
    assert {field.name for field in dataclasses.fields(HBATConfig)} < {field.name for field in described_keys()}
