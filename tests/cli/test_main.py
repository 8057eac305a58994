import _thread
import gzip
import json
import shutil
import subprocess
import sys
import threading
import time
import warnings

import datasets
import pytest
import run_files
import yaml
from cases import CHEAP_ARGS, preference_rows, sft_rows
from runs import CHECKPOINTING
from safetensors.torch import load_file
from transformers import TrainingArguments

from hbat import EWCWarning
from hbat.cli.main import main
from hbat.config.section_fields import OBJECTIVES

#: Fields of every section here; reporters belong to the run.
SECTION = {key: value for key, value in CHEAP_ARGS.items() if key != "report_to"} | {"max_length": 64, "max_steps": 2}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "safetensors", "matplotlib")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return run_files.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sft_rows(8).to_json(folder / "sft-1.jsonl")
    with gzip.open(folder / "sft-2.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in sft_rows(8, seed=1))
    preference_rows(16).to_parquet(folder / "dpo.parquet")
    preference_rows(4, seed=1).to_json(folder / "dpo-test.jsonl.gz", compression="gzip")
    return folder


def values_of(folder, model_folder, data_folder):
    """What the YAML file of a small run holds."""
    return {
        "model_name_or_path": str(model_folder),
        "output_dir": str(folder / "out"),
        "num_rounds": 1,
        "disable_tqdm": True,
        "datasets": {
            "sft": [str(data_folder / "sft-1.jsonl"), str(data_folder / "sft-2.jsonl.gz")],
            "dpo": str(data_folder / "dpo.parquet"),
        },
        "eval_datasets": {
            "sft": {"path": str(data_folder / "sft-1.jsonl"), "split": "train[:4]"},
            "dpo": str(data_folder / "dpo-test.jsonl.gz"),
        },
        "sft": dict(SECTION),
        "dpo": dict(SECTION),
    }


@pytest.fixture
def values(tmp_path, model_folder, data_folder):
    return values_of(tmp_path, model_folder, data_folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory, model_folder, data_folder):
    """The folder of a finished run; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("first")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values_of(folder, model_folder, data_folder)))
    assert main(["train", "--config", str(file)]) == 0
    (folder / "out").rename(folder / "first")
    return folder / "first"


@pytest.fixture
def hbat(tmp_path, values, capfd):
    """Run the command line on a YAML file with `values`; returns its status, its output and its error lines."""

    def run(command, *words):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        capfd.readouterr()
        status = main([command, *(["--config"] if command not in {"front", "clean"} else []), str(file), *words])
        captured = capfd.readouterr()
        return status, captured.out, [line for line in captured.err.splitlines() if line.startswith("hbat: ")]

    return run


def refusal(outcome, status=2):
    found, out, lines = outcome
    assert (found, out, len(lines)) == (status, "", 1)
    return lines[0].removeprefix("hbat: error: ")


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_trains_saves_its_model_and_prints_the_table(hbat, tmp_path):
    status, out, lines = hbat("train", "--num_rounds", "2", "--sft.learning_rate=1e-2", "--ewc.strength", "3")
    assert (status, lines) == (0, [])
    for part in (
        "after",
        "sft loss",
        "start",
        "round 1: sft",
        "round 2: dpo",
        "backward transfer",
        "forgetting",
        str(tmp_path / "out"),
        "MB there for `hbat front` and `continue_from`; `hbat clean` removes it",
    ):
        assert part in out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert len(json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]) == 5
    described = json.loads((tmp_path / "out" / "hbat_state.json").read_text())["fingerprint"]
    assert described["run"]["num_rounds"] == 2
    assert (described["sft"]["learning_rate"], described["dpo"]["learning_rate"]) == (0.01, 0.1)
    assert described["ewc"]["strength"] == 3.0
    assert described["data"]["sft"]["rows"] == 16


def test_a_run_continues_a_finished_one_and_validate_says_with_what(hbat, values, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    values["continue_from"] = str(tmp_path / "first")
    status, out, _ = hbat("validate")
    assert status == 0
    assert f"It continues the run in {tmp_path / 'first'} after its round 1 with weights, initial, " in out
    assert "importance-sft" in out
    assert ", and 3 rows of scores.\n" in out
    status, out, _ = hbat("train")
    assert status == 0
    for label in ("first, start", "first, round 1: dpo", "start", "round 2: sft", "round 2: dpo"):
        assert f"\n {label} " in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model at the start of the first of the runs that continue each other.\n" in card
    (tmp_path / "first").rename(tmp_path / "away")
    assert hbat("train", "--resume")[0] == 0
    message = refusal(hbat("validate", "--output_dir", str(tmp_path / "third")))
    assert message.startswith(f"`continue_from` '{tmp_path / 'first'}' holds no run. Give the `output_dir`")


@pytest.mark.slow
def test_an_online_objective_is_named_with_its_rewards(hbat, values, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def size(completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    online = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_generations": 2}
    options = {key: value for key, value in SECTION.items() if key != "max_length"} | online
    data = tmp_path / "prompts.jsonl"
    sft_rows(8).to_json(data)
    values.update(
        objectives=["sft", "grpo"],
        datasets={"sft": values["datasets"]["sft"], "grpo": str(data)},
        eval_datasets={"grpo": {"path": str(data), "split": "train[:3]"}},
        grpo=options | {"max_completion_length": 4},
    )
    status, out, _ = hbat("train", "--reward_funcs", f"{rewards}:size", "--grpo.beta", "0.1")
    assert status == 0
    for part in ("grpo reward", "lower is better for sft, higher is better for grpo", "round 1: grpo"):
        assert part in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["better"] == {
        "sft": "lower",
        "grpo": "higher",
    }
    values["output_dir"] = str(tmp_path / "other")
    assert hbat("validate", "--reward_funcs", f"{rewards}:size")[0] == 0
    assert "has no `sizes`. Did you mean `size`?" in refusal(hbat("validate", "--reward_funcs", f"{rewards}:sizes"))
    assert "'grpo' learns from rewards, but `reward_funcs` is None" in refusal(hbat("validate"))


def test_a_folder_that_holds_a_run_is_refused_without_resume(hbat, values, tmp_path):
    values.update(eval_datasets=None, ewc=None, objectives=["sft"], datasets={"sft": values["datasets"]["sft"]})
    assert hbat("train")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "`--resume`" in refusal(hbat("train"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert hbat("train", "--resume")[0] == 0
    changed = ("--resume", "--sft.learning_rate", "0.2")
    assert "sft.learning_rate: 0.1 -> 0.2" in refusal(hbat("train", *changed))
    assert "it requires `--resume`" in refusal(hbat("train", "--allow-changed", "sft."))
    assert hbat("train", *changed, "--allow-changed", "sft.learning_rate, run.")[0] == 0
    for state in (tmp_path / "out").glob("hbat_state*.json"):
        state.write_text("damaged")
    assert "`--resume`" in refusal(hbat("train"))
    assert "hbat_state.json cannot be read" in refusal(hbat("train", *changed))


def test_an_interrupted_run_resumes_to_the_same_weights(hbat, values, tmp_path):
    values.update(eval_datasets=None, objectives=["sft"], num_rounds=2, datasets={"sft": values["datasets"]["sft"]})
    assert hbat("train", "--output_dir", str(tmp_path / "whole"))[0] == 0
    state = tmp_path / "out" / "hbat_state.json"

    def interrupt_after_the_first_stage():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if state.exists() and json.loads(state.read_text())["next_stage"] == 1:
                _thread.interrupt_main()
                return
            time.sleep(0.001)

    threading.Thread(target=interrupt_after_the_first_stage, daemon=True).start()
    assert hbat("train") == (130, "", ["hbat: stopped by SIGINT; the run is saved, continue with `--resume`"])
    assert json.loads(state.read_text())["next_stage"] == 1
    assert hbat("train", "--resume")[0] == 0
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(resumed[name].equal(whole[name]) for name in whole)


@pytest.mark.slow
def test_the_run_file_lies_in_the_runs_folder_as_it_was_run_without_secrets(hbat, values, tmp_path):
    values |= {"env": {"HF_TOKEN": "secret"}, "objectives": ["sft"]}
    values["sft"] |= {"hub_token": "secret", "eos_token": "</s>"}
    values["datasets"].pop("dpo"), values["eval_datasets"].pop("dpo"), values.pop("dpo")
    status, _, _ = hbat("train", "--sft.max_steps", "1", "--run_name", "mine")
    assert status == 0
    text = (tmp_path / "out" / "run.yaml").read_text()
    assert "secret" not in text
    values.pop("env")
    values["sft"].pop("hub_token")
    values["sft"]["max_steps"], values["run_name"] = 1, "mine"
    assert yaml.safe_load(text) == values
    assert hbat("train", "--resume", "--sft.learning_rate", "7")[0] == 2  # another run than the one on disk
    assert (tmp_path / "out" / "run.yaml").read_text() == text
    assert "run.yaml, as it was run" in (tmp_path / "out" / "report.html").read_text()


def test_an_adapter_is_trained_with_peft_and_trained_further_from_disk(hbat, values, tmp_path):
    values.update(eval_datasets=None, ewc=None, peft={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]})
    status, out, _ = hbat("train", "--peft.lora_dropout", "1e-1")
    assert status == 0
    assert "round" not in out  # nothing was evaluated: only where the model lies
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"], config["task_type"]) == (2, 0.1, "CAUSAL_LM")
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    del values["peft"]
    values["model_name_or_path"] = str(tmp_path / "out")
    assert hbat("train", "--output_dir", str(tmp_path / "next"))[0] == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "next"))
    assert before.keys() == after.keys()
    assert not any(before[name].equal(after[name]) for name in before)
    assert not [*tmp_path.rglob("model.safetensors")]


def test_a_warning_of_this_library_is_a_line_without_code(hbat, monkeypatch, capfd):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back after the test
    assert hbat("validate")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        capfd.readouterr()
        warnings.warn_explicit(EWCWarning("The penalty did nothing."), EWCWarning, "file.py", 1)
        warnings.warn_explicit(UserWarning("Something else."), UserWarning, "file.py", 1)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["EWCWarning: The penalty did nothing.", "UserWarning: Something else. (file.py:1)"]


@pytest.mark.slow
def test_a_stage_that_is_not_finite_is_rolled_back_as_often_as_the_command_says(hbat, values, caplog):
    values.update(eval_datasets=None)
    words = ("--sft.learning_rate", "1e30", "--on_nan", "rollback", "--max_rollbacks", "2")
    assert "The loss is not finite in stage 0" in refusal(hbat("train", *words), status=1)
    assert sum("Back to the start of the stage" in message for message in caplog.messages) == 2


# --- front ----------------------------------------------------------------------------------------------------------


def test_the_front_of_a_run_is_measured_drawn_and_one_of_its_models_is_saved(hbat, first, tmp_path):
    shutil.copytree(first, tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    state = (tmp_path / "out" / "hbat_state.json").read_bytes()
    status, out, lines = hbat("front", "--points", "0,1", "--save", "0.75", str(tmp_path / "point"))
    assert (status, lines) == (0, [])
    for part in (
        "end_weight",
        "sft loss",
        "dpo loss",
        "lower is better",
        "0.75",
        "front.png",
        str(tmp_path / "point"),
    ):
        assert part in out
    rows = json.loads((tmp_path / "out" / "front.json").read_text())["rows"]
    assert [row["end_weight"] for row in rows] == [0.0, 0.75, 1.0]
    assert [row["scores"] for row in rows[::2]] == [row["scores"] for row in scores[-2:]]
    assert f"{rows[1]['scores']['dpo']['loss']:.4f}" in out
    assert (tmp_path / "out" / "front.png").exists()
    assert (tmp_path / "out" / "hbat_state.json").read_bytes() == state
    point, end = (load_file(tmp_path / name / "model.safetensors") for name in ("point", "out"))
    assert point.keys() == end.keys()
    assert not any(point[name].equal(end[name]) for name in point)
    assert (tmp_path / "point" / "tokenizer.json").exists()
    assert "`0.75`" in (tmp_path / "point" / "README.md").read_text()
    assert "is not an empty folder" in refusal(hbat("front", "--save", "1", str(tmp_path / "point")))


def test_a_finished_run_is_cleaned_and_leaves_its_model(hbat, first, tmp_path):
    assert "holds no run" in refusal(hbat("clean"))
    shutil.copytree(first, tmp_path / "out")
    status, out, lines = hbat("clean")
    assert (status, lines) == (0, [])
    assert out.startswith("Removed ")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in left
    assert not {name for name in left if name.startswith(("hbat_state", "state", "stage-"))}


REWARDS = """
def fails(completions, **columns): return [completion["score"] for completion in completions]
"""
BY_LENGTH = (
    ("--dpo.train_sampling_strategy", "group_by_length")
    if hasattr(TrainingArguments, "train_sampling_strategy")
    else ("--dpo.group_by_length",)  # its name before transformers 5
)
refuses = pytest.mark.skipif("gradient" in CHECKPOINTING, reason="transformers below 5.23 lets layers ignore it")
#: What would stop a run only in a later stage or after hours: options of the command, and words of its one line. One
#: of each kind; test_construction.py of the trainer has the others.
LATE = {
    "a sampler that the rows do not suit": (BY_LENGTH, "trainer of 'dpo'"),
    "a package": (("--dpo.use_liger_kernel",), "`dpo.use_liger_kernel` is set, but liger-kernel is not"),
    "an option of checkpointing": pytest.param(
        (f"--dpo.{CHECKPOINTING}", f"--dpo.{CHECKPOINTING}_kwargs", "{of_mine: 1}"), "trainer of 'dpo'", marks=refuses
    ),
    "a reward": (("--reward_funcs", "rewards.py:fails"), "The reward 'fails' raised TypeError"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("words", "says"), LATE.values(), ids=LATE)
def test_validation_finds_what_would_stop_a_later_stage(words, says, hbat, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    if "--reward_funcs" in words:
        values.update(objectives=["sft", "ppo"], ppo={**SECTION, "max_completion_length": 4}, eval_datasets=None)
        values["datasets"]["ppo"] = values["datasets"].pop("dpo")
        values["dpo"] = None
        values["ppo"].pop("max_length")
    assert says in refusal(hbat("validate", *words))
    assert not (tmp_path / "out").exists()


def test_validation_shows_how_long_rows_are_and_what_is_cut_and_dropped(hbat, values):
    status, out, _ = hbat("validate", "--sft.max_length", "24", "--dpo.max_length", "64")
    assert status == 0
    (row,) = [line.split() for line in out.splitlines() if "sft train" in line]
    median, most, longest, limit, cut, dropped = map(int, row[-6:])
    assert median <= most <= longest
    assert limit == 24
    assert (cut > 0) is (longest > 24)
    assert dropped <= cut
    assert "dpo train" in out


def test_files_of_other_layouts_and_a_trainer_by_name_are_trained_on(hbat, values, tmp_path):
    alpaca = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(12)]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    turns = [{"conversations": [{"from": "human", "value": f"Is it {number}?"}]} for number in range(8)]
    sides = {"chosen": {"from": "gpt", "value": "Yes, it is."}, "rejected": {"from": "gpt", "value": "No."}}
    run_files.write_rows(tmp_path / "pairs.jsonl", [row | sides for row in turns])
    (tmp_path / "watch.py").write_text(
        "from transformers import TrainerCallback\n"
        "class Watch(TrainerCallback):\n"
        "    def on_train_end(self, args, state, control, **kwargs):\n"
        "        print('watched', state.global_step)\n"
    )
    entry = {"name": "more", "trainer": "trl.SFTTrainer", "args": dict(SECTION)}
    values["objectives"] = ["sft", "dpo", {**entry, "callbacks": [f"{tmp_path / 'watch.py'}:Watch"]}]
    values["datasets"] = {
        "sft": {"path": str(tmp_path / "alpaca.json"), "eval_split": 0.25},
        "dpo": str(tmp_path / "pairs.jsonl"),
        "more": values["datasets"]["sft"],
    }
    del values["eval_datasets"]["sft"]
    datasets.enable_progress_bars()
    status, out, _ = hbat("validate")
    assert status == 0
    assert datasets.are_progress_bars_disabled()  # as standard error is no terminal
    assert "sft, row " in out
    assert "«It is" in out
    assert "«Yes, it is." in out
    status, out, _ = hbat("train")
    assert status == 0
    described = json.loads((tmp_path / "out" / "hbat_state.json").read_text())["fingerprint"]
    assert described["data"]["sft"] | {"content": ""} == {
        "rows": 9,
        "columns": ["completion", "prompt"],
        "content": "",
        "dropped": 0,
    }
    assert described["run"]["objectives"] == ["sft", "dpo", "more"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--points", "0,2"], "`--points` has '2' for a point; give a number between 0 and 1"),
        (["--points", "0,,1"], "`--points` has '' for a point"),
        (["--points", "nan"], "`--points` has 'nan' for a point"),
        (["--save", "half", "new"], "`--save` has 'half' for a point"),
        (["--save", "0.5"], "--save: expected 2 arguments"),
        ([], "holds no run"),
    ],
)
def test_what_the_front_cannot_measure_is_one_line_with_status_2(hbat, tmp_path, words, part):
    assert part in refusal(hbat("front", *words))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_file_of_the_front_may_also_be_named_as_for_the_other_commands(capsys):
    assert main(["front", "--config", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_prints_the_plan_and_changes_no_file_of_a_finished_run(hbat, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hbat_state.json").write_text("not touched")
    status, out, lines = hbat("validate", "--num_rounds", "3")
    assert (status, lines) == (0, [])
    for part in ("3 rounds of sft, dpo: 6 stages, about 12 optimizer steps", "5-6", "parameters are trainable"):
        assert part in out
    assert {path.name for path in tmp_path.rglob("*")} == {"run.yaml", "out", "hbat_state.json"}
    assert (tmp_path / "out" / "hbat_state.json").read_text() == "not touched"


@pytest.mark.parametrize(
    ("changes", "words", "parts"),
    [
        ({}, "--sft.lerning_rate 1", ["`sft.lerning_rate`", "`learning_rate`"]),
        ({}, "--sft.output_dir x", ["`sft.output_dir`", "Set the run's `output_dir`"]),
        ({}, "--dpo.loss_type nonsense", ["nonsense"]),
        ({}, "--num_rounds 99", ["train_dataset", "16 for 99 rounds"]),
        ({}, "--model_name_or_path ./none", ["`model_name_or_path`: there is no folder /"]),
        ({}, "--tokenizer_name_or_path no/one", ["`tokenizer_name_or_path` is 'no/one'", "there is no folder /"]),
        ({}, "--tokenizer_name_or_path a/b/c", ["`tokenizer_name_or_path`: there is no folder /"]),
        ({}, "--datasets.dpo none/pairs.jsonl", ["`datasets.dpo`", "there is no file /", "none/pairs.jsonl"]),
        ({}, "--datasets {sft: a.jsonl, dpo: b.csv.gz}", ["`datasets.sft`: there is no", "`datasets.dpo`: there"]),
        ({}, "--eval_datasets.dpo [a.jsonl]", ["`eval_datasets.dpo`", "there is no file /"]),
        ({}, "--datasets.dpo {pat: x}", ["`datasets.dpo`", "`pat`", "`path`"]),
        ({"peft": {"rank": 3}}, "", ["`peft.rank`"]),
        ({"peft": {"target_modules": ["nothing"]}}, "", ["nothing"]),
        ({"quantization": {"load_in_8bit": True}}, "", ["8 bits and has no adapter", "`peft: {}`"]),
        ({"peft": {}, "quantization": {"load_in_4bits": True}}, "", ["`quantization.load_in_4bits`"]),
        ({"peft": {}, "quantization": {"load_in_4bit": "yes"}}, "", ["`quantization`", "load_in_4bit"]),
    ],
)  # fmt: skip
def test_what_the_user_can_correct_is_one_line_with_status_2_and_leaves_nothing(
    hbat, values, tmp_path, changes, words, parts
):
    values.update(changes)
    message = refusal(hbat("validate", *words.split(" ", 1) if words else ()))
    for part in parts:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_misspelled_folder_is_named_beside_the_error_of_the_hub(hbat, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    message = refusal(hbat("validate", "--model_name_or_path", "smolm2"))
    assert "could be loaded from the Hub" in message
    assert "Did you mean `smollm2`?" in message


def test_faulty_rows_of_all_data_sets_are_named(hbat, values, tmp_path):
    pairs = [*preference_rows(3).to_list(), {"prompt": "a", "chosen": " b", "rejected": " b"}]
    empty = [*sft_rows(4).to_list(), {"prompt": "a", "completion": ""}]
    values["datasets"] = {
        name: run_files.write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("dpo", pairs), ("sft", empty))
    }
    values["eval_datasets"] = {"dpo": run_files.write_rows(tmp_path / "held_out.jsonl", pairs[2:])}
    message = refusal(hbat("train"))
    for part in ("train_dataset['sft'], row 4", "train_dataset['dpo'], row 3", "eval_dataset['dpo'], row 1"):
        assert part in message
    assert not (tmp_path / "out").exists()


def test_the_traceback_is_shown_when_asked_for(hbat, capfd):
    file_missing = ["train", "--config", "none.yaml"]
    assert main(file_missing) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert main([*file_missing, "--traceback"]) == 2
    assert "Traceback" in capfd.readouterr().err


# --- the command line itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [], ["tran"], ["train"], ["train", "--config"], ["front"], ["demo", "--fast"], ["demo", "--seed", "x"],
        ["init"], ["migrate"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_with_status_2(words, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hbat: error: ")
    assert captured.err.count("\n") == 1


def test_what_trains_nothing_imports_nothing_heavy(tmp_path):
    (tmp_path / "sft.yaml").write_text("{model_name_or_path: m, dataset_name: d, packing: true}")
    commands = [
        ["--help"], ["--version"], ["train", "--help"], ["validate", "--help"], ["front", "--help"], ["demo", "-h"],
        ["init", "--help"], ["migrate", "--help"], ["init", "--model", "m", "--sft", "a", "--dpo", "b"],
        ["migrate", "sft.yaml"],
    ]  # fmt: skip
    code = (
        "import sys, runpy\n"
        f"for words in {commands!r}:\n"
        "    sys.argv = ['hbat', *words]\n"
        "    try: runpy.run_module('hbat', run_name='__main__')\n"
        "    except SystemExit as end: assert end.code in (None, 0), (words, end.code)\n"
        f"    print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert found == ["HEAVY []"] * len(commands)


def test_help_of_train_describes_every_key(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for part in ("--resume", "num_rounds", "model_name_or_path", "ewc.strength", "trl.SFTConfig", "trl.DPOConfig"):
        assert part in shown
    assert all(f"{name}.KEY" in shown for name in OBJECTIVES)
