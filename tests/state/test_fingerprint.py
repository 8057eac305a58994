import json
import os
import pathlib
import re
import subprocess
import sys
import types
from importlib import metadata

import cases
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, SFTConfig

from hbat.config.hbat import HBATConfig
from hbat.state.changes import accepted, changes
from hbat.state.fingerprint import Fingerprint, fingerprint
from hbat.state.manifest import RunStateError

CLASSES = {"sft": SFTConfig, "dpo": DPOConfig}
CHEAP = {"use_cpu": True, "bf16": False, "max_steps": 2}


def described(*args, **options):
    return whole(*args, **options).values


def whole(folder="run", *, rows=None, sft=None, dpo=None, parameters=None, model=None, tokenizer=None, **options):
    given = {"sft": CHEAP | (sft or {}), "dpo": CHEAP | (dpo or {})}
    sections = {name: CLASSES[name](**{"output_dir": str(folder)} | given[name]) for name in CLASSES}
    data = rows or {"sft": cases.sft_rows(6), "dpo": cases.preference_rows(6)}
    parameters = parameters or {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    return fingerprint(
        HBATConfig(output_dir=str(folder), **{**given, **options}),
        sections,
        data,
        parameters,
        model,
        processing_class=tokenizer,
    )


def differences(before, now):
    return [str(change) for change in changes(before, now)]


def names(before, now):
    return [change.name for change in changes(before, now)]


@pytest.fixture(scope="module")
def base():
    return described()


def test_equal_runs_have_equal_fingerprints(base):
    assert described() == base
    assert differences(base, described()) == []


def test_a_fingerprint_is_plain_json(base):
    assert json.loads(json.dumps(base)) == base


@pytest.mark.slow  # a run that another process resumes, in tests/trainer/test_resume.py, shows it as well
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
        ({"num_rounds": 2}, "run.num_rounds: 1 -> 2"),
        ({"seed": 7}, "run.seed: 42 -> 7"),
        ({"optimizer_state": "reset"}, "run.optimizer_state: 'carry' -> 'reset'"),
        ({"lr_schedule": {"dpo": "run"}}, "run.lr_schedule.dpo: 'stage' -> 'run'"),
        ({"end_weight": 0.5}, "run.end_weight: 1.0 -> 0.5"),
        ({"objectives": ["dpo", "sft"]}, "run.objectives: ['sft', 'dpo'] -> ['dpo', 'sft']"),
        ({"ewc": {"strength": 3.0}}, "ewc.strength: 0.5 -> 3.0"),
        ({"sft": {"learning_rate": 0.5}}, "sft.learning_rate: 2e-05 -> 0.5"),
        ({"dpo": {"beta": 0.2}}, "dpo.beta: 0.1 -> 0.2"),
        ({"dpo": {"seed": 1}}, "dpo.seed: 42 -> 1"),
        ({"sft": {"eos_token": "<end>"}}, "sft.eos_token: None -> '<end>'"),
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
    assert described(lr_schedule={"sft": "stage", "dpo": "stage"}) == base


def _with(rows, **changes):
    return {"sft": cases.sft_rows(6), "dpo": cases.preference_rows(6)} | changes


@pytest.mark.parametrize(
    ("dataset", "changed"),
    [
        (cases.sft_rows(6, seed=1), ["data.sft.content"]),
        (cases.sft_rows(6).select([1, 0, 2, 3, 4, 5]), ["data.sft.content"]),
        (cases.sft_rows(5), ["data.sft.content", "data.sft.rows"]),
        (cases.sft_rows(6).rename_column("prompt", "question"), ["data.sft.columns", "data.sft.content"]),
        (cases.sft_rows(6).add_column("source", ["x"] * 6), ["data.sft.columns", "data.sft.content"]),
    ],
    ids=["a row", "order", "number", "name", "column"],
)
def test_changed_data_is_named_by_data_set_and_by_what_changed(dataset, changed, base):
    assert names(base, described(rows=_with(None, sft=dataset))) == changed


def test_the_order_of_columns_is_no_change(base):
    turned = cases.sft_rows(6).select_columns(["completion", "prompt"])
    assert described(rows=_with(None, sft=turned)) == base


def test_other_parameters_show(base):
    more = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(1)}
    assert names(base, described(parameters=more)) == [
        "parameters.shapes",
        "parameters.tensors",
    ]
    wider = {"a": torch.zeros(2, 4), "b": torch.zeros(())}
    assert names(base, described(parameters=wider)) == ["parameters.shapes"]


def test_an_adapter_on_another_base_model_shows():
    peft = pytest.importorskip("peft")
    first, again, other = (
        described(model=peft.get_peft_model(cases.tiny_llama(seed), peft.LoraConfig(target_modules=["q_proj"])))
        for seed in (1, 1, 2)
    )
    assert differences(first, again) == []
    assert names(first, other) == ["parameters.frozen"]


def packed(*values, dtype=torch.uint8, name="weight"):
    model = torch.nn.Module()
    model.register_parameter(name, torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False))
    return model


@pytest.mark.parametrize(
    "other",
    [
        packed(1, 3),
        packed(1, 2, 3),
        packed(1, 2, dtype=torch.int8),
        packed(1, 2, name="other"),
        packed(1, 2).to(torch.device("meta")),
        torch.nn.Module(),
    ],
    ids=["value", "shape", "dtype", "name", "offloaded", "none"],
)
def test_a_frozen_tensor_of_any_kind_shows_by_name_shape_dtype_and_values(other):
    assert names(described(model=packed(1, 2)), described(model=other)) == ["parameters.frozen"]


def test_trained_values_and_where_the_model_lies_do_not_count():
    models = cases.frozen_llama(), cases.frozen_llama()
    models[1].config._name_or_path = "moved/elsewhere"  # noqa: SLF001 - where transformers keeps it
    with torch.no_grad():
        models[1].lm_head.weight.fill_(1.0)
    assert described(model=models[0]) == described(model=models[1])


def test_frozen_weights_are_named_alike_by_a_compiled_model():
    model = cases.frozen_llama()
    assert described(model=torch.compile(model, backend="eager")) == described(model=model)


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
        {"sft": {"per_device_eval_batch_size": 1, "eval_accumulation_steps": 3}},
        {"sft": {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 1, "eval_on_start": True}},
        {"dpo": {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}},
        {"dpo": {"dataloader_pin_memory": False}},
        {"dpo": {"push_to_hub": True, "hub_model_id": "some/model", "hub_strategy": "end"}},
        {"dpo": {"save_only_model": True, "torch_empty_cache_steps": 5}},
        {"sft": {"include_num_input_tokens_seen": "all"}},
        {"parameters": {"a": torch.ones(2, 3), "b": torch.ones(())}},
    ],
    ids=str,
)
def test_where_and_how_much_is_logged_or_kept_does_not_count(options, base):
    assert differences(base, described(**options)) == []


def test_another_release_of_trl_with_other_fields_is_no_change(base):
    other = json.loads(json.dumps(base))
    other["sft"] |= {"a_new_option": 3, "fsdp_config": {"new": True}}
    other["dpo"]["accelerator_config"]["a_new_option"] = 3
    del other["dpo"]["beta"]
    assert differences(base, other) == []
    assert differences(other, base) == []


def test_a_field_of_trl_that_holds_options_counts_as_a_whole(base):
    assert names(base, described(sft={"lr_scheduler_kwargs": {"num_cycles": 2}})) == ["sft.lr_scheduler_kwargs"]
    before, now = ({"sft": {"lr_scheduler_kwargs": each}} for each in ({}, {"num_cycles": 2}))
    assert differences(before, now) == ["sft.lr_scheduler_kwargs.num_cycles: None -> 2"]


@pytest.mark.parametrize("section", ["run", "ewc", "data", "parameters"])
def test_our_own_sections_are_compared_key_by_key(section, base):
    more = base | {section: base[section] | {"come": 1}}
    assert differences(base, more) == [f"{section}.come: None -> 1"]
    assert differences(more, base) == [f"{section}.come: 1 -> None"]


# --- defaults and versions -------------------------------------------------------------------------------------------


def test_what_the_user_has_set_is_listed_by_section():
    ready = DPOConfig(output_dir="run", beta=0.2, loss_type=["sigmoid"], **CHEAP)
    own = types.SimpleNamespace(name="own", config={"learning_rate": 0.5})
    config = HBATConfig(
        output_dir="run", objectives=["sft", "dpo", "kto", own], sft={"max_steps": 3}, dpo=ready, ewc={"strength": 3.0}
    )
    given = fingerprint(config, {}, {}, {}).given
    assert (given["sft"], given["kto"], given["own"], given["ewc"]) == (
        ["max_steps"],
        [],
        ["learning_rate"],
        ["strength"],
    )
    assert {"beta", "use_cpu", "max_steps"} <= set(given["dpo"])
    assert not {"loss_type", "learning_rate", "seed"} & set(given["dpo"])
    assert fingerprint(HBATConfig(output_dir="run", ewc=None), {}, {}, {}).given["ewc"] == []


def test_a_run_of_another_trl_with_another_default_is_no_other_run(base):
    now = whole()
    values = base | {"dpo": base["dpo"] | {"beta": 0.3}}
    before = Fingerprint(values, now.given, now.versions | {"trl": "0.9.0"})
    message = rf"^Defaults have .*\(trl 0\.9\.0 -> {re.escape(now.versions['trl'])}\): dpo\.beta: 0\.3 -> 0\.1\. Set"
    with pytest.raises(RunStateError, match=message):
        accepted(before, now, [], output_dir="run")
    assert accepted(before, whole(dpo={"beta": 0.3}), [], output_dir="run") == []
    assert len(accepted(before, now, ["dpo.beta"], output_dir="run")) == 1


def test_libraries_are_listed_with_their_versions():
    versions = whole().versions
    assert versions["trl"] == metadata.version("trl")
    assert versions.keys() >= {"trl", "transformers", "accelerate", "datasets", "torch"}


# --- data, tokenizer, processes --------------------------------------------------------------------------------------


def test_a_change_in_any_row_of_a_large_data_set_shows():
    def with_other(*changed):
        rows = [{"prompt": str(index), "completion": "y" if index in changed else "x"} for index in range(2500)]
        return described(rows=_with(None, dpo=Dataset.from_list(rows)))

    before = with_other()
    for index in (0, 1, 1234, 2498, 2499):
        assert names(before, with_other(index)) == ["data.dpo.content"]


def test_another_number_of_processes_shows_with_the_reason(base, monkeypatch):
    monkeypatch.setattr("hbat.state.fingerprint.process_count", lambda: 2)
    expected = "run.processes: 1 -> 2 (another number of processes gives other results)"
    assert differences(base, described()) == [expected]


def test_the_tokenizer_counts_by_vocabulary_and_template():
    first = described(tokenizer=cases.tiny_tokenizer())
    assert differences(first, described(tokenizer=cases.tiny_tokenizer())) == []
    used = cases.tiny_tokenizer()
    used(["some text"], truncation=True, max_length=3, padding="max_length")
    assert differences(first, described(tokenizer=used)) == []
    templated, larger, other_end = (cases.tiny_tokenizer() for _ in range(3))
    templated.chat_template = "{{ messages }}"
    larger.add_tokens(["<new>"])
    other_end.eos_token = other_end.pad_token
    found = [names(first, described(tokenizer=each)) for each in (templated, larger, other_end)]
    assert found == [["tokenizer.template"], ["tokenizer.vocabulary"], ["tokenizer.vocabulary"]]


def test_the_tokenizer_of_a_processor_counts():
    tokenizer = cases.tiny_tokenizer()
    processor = types.SimpleNamespace(tokenizer=tokenizer, chat_template=tokenizer.chat_template)
    assert described(tokenizer=processor) == described(tokenizer=tokenizer)
