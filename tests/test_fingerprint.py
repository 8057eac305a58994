import json
import os
import pathlib
import subprocess
import sys

import cases
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, SFTConfig

from hbat.config import HBATConfig
from hbat.fingerprint import differences, fingerprint

CLASSES = {"sft": SFTConfig, "dpo": DPOConfig}
CHEAP = {"use_cpu": True, "bf16": False, "max_steps": 2}


def described(folder="run", *, rows=None, sft=None, dpo=None, parameters=None, **options):
    given = {"sft": sft or {}, "dpo": dpo or {}}
    sections = {name: CLASSES[name](**{"output_dir": str(folder)} | CHEAP | given[name]) for name in CLASSES}
    data = rows or {"sft": cases.sft_rows(6), "dpo": cases.preference_rows(6)}
    parameters = parameters or {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    return fingerprint(HBATConfig(output_dir=str(folder), **options), sections, data, parameters)


@pytest.fixture(scope="module")
def base():
    return described()


def test_equal_runs_have_equal_fingerprints(base):
    assert described() == base
    assert differences(base, described()) == []


def test_a_fingerprint_is_plain_json(base):
    assert json.loads(json.dumps(base)) == base


def test_a_fingerprint_is_the_same_in_another_process(base):
    program = "import json, test_fingerprint; print(json.dumps(test_fingerprint.described(), sort_keys=True))"
    here = pathlib.Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), *(each for each in sys.path if each)])
    seeds = {"PYTHONHASHSEED": "77", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | seeds, capture_output=True, text=True, check=True
    ).stdout
    assert differences(base, json.loads(printed.strip().splitlines()[-1])) == []


# --- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_rounds": 2}, "run.num_rounds: 4 -> 2"),
        ({"seed": 7}, "run.seed: 42 -> 7"),
        ({"optimizer_state": "reset"}, "run.optimizer_state: 'carry' -> 'reset'"),
        ({"lr_schedule": {"dpo": "run"}}, "run.lr_schedule.dpo: 'stage' -> 'run'"),
        ({"average": {"sft": 0.5}}, "run.average.sft: 1.0 -> 0.5"),
        ({"objectives": ["dpo", "sft"]}, "run.objectives: ['sft', 'dpo'] -> ['dpo', 'sft']"),
        ({"ewc": {"f_max": 3.0}}, "ewc.f_max: 10.0 -> 3.0"),
        ({"sft": {"learning_rate": 0.5}}, "sft.learning_rate: 2e-05 -> 0.5"),
        ({"dpo": {"beta": 0.2}}, "dpo.beta: 0.1 -> 0.2"),
        ({"dpo": {"seed": 1}}, "dpo.seed: 42 -> 1"),
        ({"dpo": {"max_steps": 3}}, "dpo.max_steps: 2 -> 3"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_changed_option_is_named_with_both_values(options, line, base):
    assert differences(base, described(**options)) == [line]


def test_consolidation_switched_off_is_one_change(base):
    (line,) = differences(base, described(ewc=None))
    assert line.startswith("ewc: {")
    assert line.endswith(" -> None")


def test_words_that_mean_the_same_for_every_objective_are_no_change(base):
    assert described(lr_schedule={"sft": "stage", "dpo": "stage"}, average={"dpo": 1.0}) == base


def _with(rows, **changes):
    return {"sft": cases.sft_rows(6), "dpo": cases.preference_rows(6)} | changes


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (cases.sft_rows(6, seed=1), ["data.sft.sample"]),
        (cases.sft_rows(6).select([1, 0, 2, 3, 4, 5]), ["data.sft.sample"]),
        (cases.sft_rows(5), ["data.sft.rows", "data.sft.sample"]),
        (cases.sft_rows(6).rename_column("prompt", "question"), ["data.sft.columns", "data.sft.sample"]),
        (cases.sft_rows(6).add_column("source", ["x"] * 6), ["data.sft.columns", "data.sft.sample"]),
    ],
    ids=["a row", "order", "number", "name", "column"],
)
def test_changed_data_is_named_by_data_set_and_by_what_changed(dataset, names, base):
    lines = differences(base, described(rows=_with(None, sft=dataset)))
    assert [each.split(":")[0] for each in lines] == names


@pytest.mark.parametrize("changed", range(6))
def test_a_change_in_any_row_shows(changed, base):
    rows = cases.preference_rows(6).to_list()
    rows[changed]["rejected"] += "!"
    lines = differences(base, described(rows=_with(None, dpo=Dataset.from_list(rows))))
    assert [each.split(":")[0] for each in lines] == ["data.dpo.sample"]


def test_the_order_of_columns_is_no_change(base):
    turned = cases.sft_rows(6).select_columns(["completion", "prompt"])
    assert described(rows=_with(None, sft=turned)) == base


def test_other_parameters_show(base):
    more = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(1)}
    assert [each.split(":")[0] for each in differences(base, described(parameters=more))] == [
        "parameters.shapes",
        "parameters.tensors",
    ]
    wider = {"a": torch.zeros(2, 4), "b": torch.zeros(())}
    assert [each.split(":")[0] for each in differences(base, described(parameters=wider))] == ["parameters.shapes"]


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"folder": "elsewhere"},
        {"run_name": "second try"},
        {"report_to": "tensorboard"},
        {"disable_tqdm": True},
        {"sft": {"logging_steps": 1}},
        {"sft": {"logging_first_step": True}},
        {"dpo": {"save_steps": 3, "save_total_limit": 2}},
        {"dpo": {"save_strategy": "no"}},
        {"dpo": {"log_level": "error"}},
        {"dpo": {"local_rank": 1}},
        {"parameters": {"a": torch.ones(2, 3), "b": torch.ones(())}},
    ],
    ids=str,
)
def test_where_and_how_much_is_logged_or_kept_does_not_count(options, base):
    assert differences(base, described(**options)) == []


# --- differences -----------------------------------------------------------------------------------------------------


def test_differences_are_sorted_and_dotted_and_show_what_came_and_went():
    before = {"b": 1, "a": {"x": 1, "y": {"z": [1]}}, "gone": 3}
    now = {"b": 2, "a": {"x": 1, "y": {"z": [2]}}, "new": None, "come": 0}
    assert differences(before, now) == ["a.y.z: [1] -> [2]", "b: 1 -> 2", "come: None -> 0", "gone: 3 -> None"]


def test_a_section_that_became_a_value_is_one_change():
    assert differences({"ewc": {"f_max": 1}}, {"ewc": None}) == ["ewc: {'f_max': 1} -> None"]


def test_a_large_data_set_is_sampled_over_its_whole_length():
    rows = [{"prompt": str(index), "completion": "x"} for index in range(2500)]
    dataset = {"sft": Dataset.from_list(rows), "dpo": cases.preference_rows(6)}
    rows[-2]["completion"] = "y"  # an even row, of which every second is sampled
    changed = {"sft": Dataset.from_list(rows), "dpo": cases.preference_rows(6)}
    assert len(differences(described(rows=dataset), described(rows=changed))) == 1
