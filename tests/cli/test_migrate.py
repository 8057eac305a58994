"""Files of TRL's commands, LLaMA-Factory and axolotl become one run file; what is not carried over is named in it."""

import dataclasses
import enum
import json
import re
import subprocess
import sys

import cases
import pytest
import run_files
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from junk import JUNK, fixed, one_line
from runs import needs_kto
from safetensors.torch import load_file
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    RLOOConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from hbat.cli.build import check_sections, peft_config, quantization_config
from hbat.cli.main import main
from hbat.cli.migrate import migrate
from hbat.cli.run_file import parse
from hbat.config.ewc import EWCConfig
from hbat.config.foreign import OWNED_BY_RUN, PLACES, REASONS, RENAMED
from hbat.config.section_fields import section_fields

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig, "rloo": RLOOConfig}
SFT = {
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "dataset_name": "trl-lib/Capybara",
    "output_dir": "outputs/sft",
    "learning_rate": 2e-4,
    "packing": True,
    "use_cpu": True,
}
DPO = {
    "model_name_or_path": "outputs/sft",
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "output_dir": "outputs/dpo",
    "learning_rate": 5e-6,
    "beta": 0.2,
    "use_cpu": True,
}
LORA = {"use_peft": True, "lora_r": 32, "lora_target_modules": "all-linear"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def migrated(folder):
    """Migrate files, given as name and values; returns the run and its text."""

    def run(*given, **files):
        for name, values in files.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        text = migrate(given or [f"{name}.yaml" for name in files])
        (folder / "run.yaml").write_text(text)
        return parse("run.yaml"), text

    return run


@pytest.fixture
def refusal(migrated):
    def refuse(*given, **files):
        with pytest.raises((ValueError, TypeError)) as caught:
            migrated(*given, **files)
        return one_line(caught.value)

    return refuse


def notes(text):
    """Reasons by key, from the comments."""
    found = re.findall(r"^# - (.*)\n#   (.*)$", text, flags=re.MULTILINE)
    return {key: reason for keys, reason in found for key in re.findall(r"(?:^|, )([\w.]+)(?=:|,|$)", keys)}


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_two_files_of_trl_become_a_run_with_the_defaults_of_hbat(migrated):
    run, text = migrated(sft=SFT, dpo=DPO)
    assert run.model_name_or_path == "Qwen/Qwen3-0.6B"
    assert run.config.objectives == ["sft", "dpo"]
    assert run.datasets == {"sft": "trl-lib/Capybara", "dpo": "trl-lib/ultrafeedback_binarized"}
    assert run.config.output_dir == "outputs/dpo-hbat"
    assert run.config.sft == {"learning_rate": 2e-4, "packing": True, "use_cpu": True}
    assert run.config.dpo == {"learning_rate": 5e-6, "beta": 0.2, "use_cpu": True}
    assert (run.config.num_rounds, run.config.ewc, run.peft) == (1, EWCConfig(), None)
    assert run.config.model_init_kwargs == {"dtype": "float32"}
    assert notes(text) == {}


def test_the_run_without_the_penalty_is_there_to_be_uncommented(migrated, folder):
    _, text = migrated(sft=SFT, dpo=DPO)
    head = text.partition("model_name_or_path")[0]
    assert "in turn, without it" in head
    (folder / "plain.yaml").write_text(re.sub(r"^# (num_rounds|ewc):", r"\1:", text, flags=re.MULTILINE))
    assert parse("plain.yaml").config.ewc is None
    assert parse("plain.yaml").config.num_rounds == 1
    assert "num_rounds" not in migrated(sft=SFT)[1]


#: What belongs to the run, or depends on the folder.
OF_RUN = {*OWNED_BY_RUN, "logging_dir", "trust_remote_code", "hub_model_id", "do_eval", "do_train"}


@pytest.mark.parametrize("kind", [pytest.param("kto", marks=needs_kto), "sft", "dpo", "grpo", "rloo"])
def test_the_arguments_of_a_section_are_those_that_trl_reads_from_its_file(kind, migrated):
    values = SFT | LORA | {"dtype": "bfloat16", "load_in_4bit": True, "use_bnb_nested_quant": True, "seed": 7}
    values |= {"hub_model_id": "me/x", "save_steps": 20, "lr_scheduler_type": "cosine", "warmup_steps": 5, "beta": 0.3}
    own = {"sft": {"assistant_only_loss": False}, "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]}}
    values |= own.get(kind, {})
    values = {key: value for key, value in values.items() if key != "packing" or kind == "sft"}
    if kind == "sft":
        del values["beta"]
    run, _ = migrated(**{kind: values})
    parser = TrlParser((ScriptArguments, CONFIGS[kind], ModelConfig, DatasetMixtureConfig))
    _, theirs, model, _ = parser.parse_args_and_config(["--config", f"{kind}.yaml"])
    ours = check_sections(run)[kind]
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in OF_RUN:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert peft_config(run).to_dict() == get_peft_config(model).to_dict()
    assert quantization_config(run).to_dict() == get_quantization_config(model).to_dict()
    assert run.config.model_init_kwargs == {"dtype": "bfloat16"}


def default(field):
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [pytest.param("kto", marks=needs_kto), "sft", "dpo", "grpo", "rloo"])
def test_every_key_that_a_command_of_trl_takes_is_in_the_run_or_named_with_a_reason(kind, migrated):
    configs = (CONFIGS[kind], ModelConfig, ScriptArguments, DatasetMixtureConfig)
    values = {field.name: default(field) for config in configs for field in dataclasses.fields(config) if field.init}
    plain = (str, int, float, bool, list, dict)
    values = {key: value for key, value in values.items() if isinstance(value, plain) and value not in ([], "")}
    values |= SFT | LORA | {"load_in_4bit": True, "streaming": True, "push_to_hub": True, "dataset_config": "all"}
    values |= {"dataset_train_split": "a", "dataset_test_split": "b", "eval_strategy": "steps", "test_split_size": 0.1}
    values.pop("packing", None)
    run, text = migrated(**{kind: values})
    section = getattr(run.config, kind)
    data = {
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "test_split_size",
        "datasets",
    }
    for key, value in values.items():
        if value is False or key in {*data, "output_dir", "model_name_or_path", "use_peft"}:
            continue
        place = PLACES.get(key, "").replace("*", kind).partition(";")[0]
        if key in section:
            assert section[key] == value
        elif place:
            name, _, inner = place.rpartition(".")
            there = {
                "peft": run.peft,
                "quantization": run.quantization,
                "model_init_kwargs": run.config.model_init_kwargs,
            }
            own = run.config if hasattr(run.config, inner) else run
            assert there[name][inner] == value if name in there else getattr(own, inner) == value
        else:
            assert key in notes(text), key
    source = {"path": "trl-lib/Capybara", "name": "all"}
    assert run.datasets == {kind: {**source, "split": "a", "eval_split": 0.1}}
    assert run.eval_datasets == {kind: {**source, "split": "b"}}
    assert check_sections(run)[kind].eval_strategy == "steps"


def test_a_mixture_of_trl_becomes_one_of_the_objective(migrated):
    parts = [
        {"path": "a/b", "fraction": 0.7},
        {"path": "json", "data_files": "c.jsonl", "split": "train[:9]", "columns": ["messages"], "fraction": 0.3},
        {"path": "d", "name": "e", "data_dir": "f", "split": "train", "fraction": 0.1},
    ]
    values = {key: value for key, value in SFT.items() if key != "dataset_name"}
    run, _ = migrated(sft={**values, "datasets": parts})
    mixture = [
        {"path": "a/b", "weight": 0.7},
        {"path": "json", "data_files": "c.jsonl", "split": "train[:9]", "columns": ["messages"], "weight": 0.3},
        {"path": "d", "name": "e", "data_dir": "f", "weight": 0.1},
    ]
    assert run.datasets["sft"] == mixture
    run, _ = migrated(sft={**values, "datasets": parts, "test_split_size": 0.02})
    assert run.datasets["sft"] == {"mixture": mixture, "eval_split": 0.02}
    run, _ = migrated(sft={**values, "datasets": [{"path": "train", "fraction": 1}], "eval_strategy": "steps"})
    assert (run.datasets["sft"], run.eval_datasets) == ("train", {})
    run, text = migrated(sft={**values, "datasets": [{"path": "a"}, {"path": "b"}], "test_split_size": 100})
    assert run.datasets["sft"] == ["a", "b"]
    assert "a share of the rows" in notes(text)["test_split_size"]


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("dpo.yaml", {}, "dpo"),
        ("my-kto_7b.yaml", {}, "kto"),
        ("sft=a.yaml", {}, "sft"),
        ("kto=dpo.yaml", {}, "kto"),
        ("a.yaml", {"packing": True}, "sft"),
        ("a.yaml", {"precompute_ref_log_probs": True, "loss_weights": [1.0]}, "dpo"),
        ("a.yaml", {"desirable_weight": 1.0}, "kto"),
        ("a.yaml", {"scale_rewards": "group", "num_generations": 2}, "grpo"),
        ("a.yaml", {"normalize_advantages": True}, "rloo"),
        ("grpo.yaml", {"num_generations": 2}, "grpo"),
        ("sft_or_dpo.yaml", {"loss_weights": [1.0]}, "dpo"),
        ("dpo/config.yaml", {}, "dpo"),
        ("ppo.yaml", {"vf_coef": 0.1}, "ppo"),
    ],
)
def test_what_a_file_trains_is_told_by_its_name_its_keys_or_the_user(name, values, kind, folder):
    file = folder / name.rpartition("=")[2]
    file.parent.mkdir(exist_ok=True)
    plain = {key: SFT[key] for key in ("model_name_or_path", "dataset_name", "learning_rate")}
    file.write_text(yaml.safe_dump(plain | values))
    assert yaml.safe_load(migrate([name]))["objectives"] == [kind]


def test_a_file_of_which_cannot_be_told_what_it_trains_is_refused(refusal):
    plain = {key: SFT[key] for key in ("model_name_or_path", "dataset_name", "learning_rate")}
    message = refusal(mine=plain)
    assert message.startswith("It cannot be told what mine.yaml trains: its keys suit sft, dpo, kto,")
    assert "`dpo=mine.yaml`" in message
    assert "its name sft, dpo." in refusal(sft_dpo=plain)
    assert "its keys suit sft, its name dpo." in refusal(dpo=plain | {"packing": True})


def test_the_second_file_goes_on_with_what_the_first_leaves(migrated, refusal):
    first = SFT | {"hub_model_id": "me/sft"}
    for start in ("outputs/sft", "./outputs/sft/", "outputs/sft/checkpoint-50", "me/sft"):
        run, text = migrated(sft=first, dpo=DPO | {"model_name_or_path": start})
        assert run.model_name_or_path == SFT["model_name_or_path"]
        assert "model_name_or_path" not in notes(text)
    _, text = migrated(sft=first, dpo=DPO | {"model_name_or_path": SFT["model_name_or_path"]})
    assert notes(text)["model_name_or_path"] == "Here it continues from where sft.yaml ended."
    message = refusal(sft=first, dpo=DPO | {"model_name_or_path": "other"})
    for part in ("dpo.yaml begins with 'other'", "'Qwen/Qwen3-0.6B', as sft.yaml does", "'outputs/sft'"):
        assert part in message
    refusal("dpo.yaml", "sft.yaml", sft=first, dpo=DPO)


def test_what_a_run_has_once_is_taken_from_the_first_file_and_the_rest_is_named(migrated):
    first = SFT | LORA | {"dtype": "bfloat16", "run_name": "a", "report_to": "wandb"}
    second = DPO | LORA | {"lora_r": 8, "dtype": "float32", "run_name": "b", "report_to": "wandb", "seed": 3}
    run, text = migrated(sft=first, dpo=second)
    assert run.peft == {"r": 32, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert run.config.model_init_kwargs == {"dtype": "bfloat16"}
    assert (run.config.run_name, run.config.report_to) == ("a", "wandb")
    assert run.config.dpo["seed"] == 3
    assert notes(text).keys() == {"peft.r", "model_init_kwargs.dtype", "run_name"}
    assert "a file before has 32." in notes(text)["peft.r"]
    _, text = migrated(sft=first, dpo=DPO | {"use_peft": True})  # which leaves them to TRL's defaults
    assert notes(text).keys() == {"peft.r", "model_init_kwargs.dtype"}


def test_an_adapter_in_one_file_alone_is_refused(refusal):
    message = refusal(sft=SFT, dpo=DPO | LORA)
    assert message.startswith("sft.yaml trains all weights and dpo.yaml an adapter")
    assert refusal(sft=SFT | LORA, dpo=DPO).startswith("dpo.yaml trains all weights and sft.yaml an adapter")


def test_options_of_an_adapter_or_of_bits_that_are_not_used_are_left_out(migrated):
    run, text = migrated(sft=SFT | LORA | {"use_peft": False, "load_in_4bit": True})
    assert (run.peft, run.quantization) == (None, None)
    assert notes(text).keys() == {"lora_r", "lora_target_modules", "load_in_4bit"}
    run, text = migrated(sft=SFT | LORA | {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"})
    assert run.quantization == {"load_in_8bit": True}
    assert notes(text).keys() == {"bnb_4bit_quant_type"}
    run, _ = migrated(sft=SFT | {"use_peft": True, "load_in_4bit": True})
    assert run.peft == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    assert run.quantization == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
    }


def test_what_trl_says_otherwise_today_is_translated(migrated):
    old = {"rpo_alpha": 0.5, "max_prompt_length": 9, "torch_dtype": "bfloat16", "no_cuda": True, "ref_model": "x"}
    run, text = migrated(dpo=DPO | old | {"max_seq_length": 64, "warmup_ratio": 0.1})
    assert run.config.dpo["loss_type"] == ["sigmoid", "sft"]
    assert run.config.dpo["loss_weights"] == [1.0, 0.5]
    assert run.config.dpo["max_length"] == 64
    assert run.config.dpo["warmup_ratio" if "warmup_ratio" in section_fields("dpo") else "warmup_steps"] == 0.1
    assert run.config.model_init_kwargs == {"dtype": "bfloat16"}
    assert notes(text).keys() == {"max_prompt_length", "ref_model"}
    run, text = migrated(dpo=DPO | {"model_init_kwargs": {"dtype": "bfloat16", "revision": "v2"}})
    assert run.config.model_init_kwargs == {"dtype": "bfloat16", "revision": "v2"}
    assert notes(text) == {}
    run, _ = migrated(dpo=DPO | {"rpo_alpha": 0.5, "loss_type": ["hinge"]})
    assert run.config.dpo["loss_type"] == ["hinge", "sft"]


def test_a_reward_model_is_trained_before_and_scores_the_online_objective(migrated):
    reward = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "outputs/rm/"}
    grpo = DPO | {"reward_funcs": ["accuracy_reward", "mine.rewards.size"]}
    run, text = migrated(sft=SFT, reward=reward, grpo=grpo)
    assert run.config.objectives == ["sft", "grpo"]
    assert run.reward_funcs == ["trl.rewards:accuracy_reward", "mine.rewards:size", "outputs/rm"]
    assert "train this model first" in notes(text)["output_dir"].lower()
    run, text = migrated(sft=SFT, reward=reward, dpo=DPO)
    assert run.reward_funcs is None
    assert notes(text)["output_dir"] == "Of sft, dpo none learns from a reward model."
    run, text = migrated(sft=SFT, grpo=DPO)
    assert "functions or models that score completions" in notes(text)["reward_funcs"]
    run, text = migrated(sft=SFT, grpo=DPO | {"reward_model_name_or_path": "org/rm-7.1"})
    assert run.reward_funcs == ["org/rm-7.1"]
    run, text = migrated(sft=SFT, grpo=DPO | {"reward_funcs": "get_soft_overlong_punishment"})
    assert "A call makes it." in text


# --- LLaMA-Factory ---------------------------------------------------------------------------------------------------

FACTORY = {
    "model_name_or_path": "llama",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "all",
    "dataset": "identity, alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 4096,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 2,
    "output_dir": "saves/sft",
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-4,
    "bf16": True,
    "val_size": 0.1,
    "flash_attn": "fa2",
}


def test_files_of_llama_factory_become_a_run(migrated):
    dpo = FACTORY | {
        "stage": "dpo",
        "dataset": "pairs",
        "output_dir": "saves/dpo",
        "adapter_name_or_path": "saves/sft",
    }
    dpo |= {"pref_beta": 0.2, "pref_loss": "sigmoid", "pref_ftx": 0.3}
    run, text = migrated(a=FACTORY, b=dpo)
    assert run.config.objectives == ["sft", "dpo"]
    assert run.model_name_or_path == "llama"
    assert run.peft == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    assert run.config.model_init_kwargs == {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}
    part = {"path": "data/identity.json", "rows": 1000}
    assert run.datasets["sft"] == {
        "mixture": [part, {"path": "data/alpaca_en_demo.json", "rows": 1000}],
        "eval_split": 0.1,
    }
    assert run.datasets["dpo"] == {"path": "data/pairs.json", "rows": 1000, "eval_split": 0.1}
    shared = {"max_length": 4096, "learning_rate": 1e-4, "bf16": True}
    assert run.config.sft == shared | {"dataset_num_proc": 2, "per_device_train_batch_size": 1}
    more = {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    assert run.config.dpo == run.config.sft | more
    left = {"dataset", "do_train", "template", "overwrite_cache", "overwrite_output_dir", "train_on_prompt"}
    assert notes(text).keys() == left
    assert "assistant_only_loss" in notes(text)["train_on_prompt"]


def test_defaults_of_llama_factory_that_are_not_those_of_trl_are_written(migrated):
    run, text = migrated(a={"stage": "sft", "model_name_or_path": "m", "dataset": "d", "quantization_bit": 4})
    assert run.config.sft == {"max_length": 2048, "learning_rate": 5e-5, "bf16": False}
    assert run.peft == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert run.quantization == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    }
    assert run.config.output_dir == "sft-hbat"
    full = {"stage": "kto", "model_name_or_path": "m", "dataset": "d", "finetuning_type": "full"}
    run, text = migrated(a=full | {"train_on_prompt": True, "pref_beta": 0.3, "kto_chosen_weight": 2.0})
    assert run.peft is None
    assert run.config.kto["beta"] == 0.3
    assert run.config.kto["desirable_weight"] == 2.0
    assert notes(text).keys() == {"dataset", "train_on_prompt"}
    run, text = migrated(a={"stage": "sft", "model_name_or_path": "m", "dataset": "d", "train_on_prompt": True})
    assert run.config.sft["completion_only_loss"] is False
    assert "train_on_prompt" not in notes(text)


def test_data_that_llama_factory_lists_is_found_there(migrated, folder):
    (folder / "mine").mkdir()
    listed = {
        "a": {
            "file_name": "a.jsonl",
            "columns": {"prompt": "question", "response": "output", "system": "rules"},
            "num_samples": 5,
        },
        "b": {
            "hf_hub_url": "org/b",
            "subset": "en",
            "split": "test",
            "folder": "f",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"user_tag": "asker", "assistant_tag": "gpt", "role_tag": "from", "content_tag": "says"},
        },
    }
    (folder / "mine" / "dataset_info.json").write_text(json.dumps(listed))
    values = FACTORY | {"dataset_dir": "mine", "dataset": "a,b", "eval_dataset": "b"}
    del values["max_samples"], values["val_size"]
    run, text = migrated(a=values)
    b = {"path": "org/b", "name": "en", "data_dir": "f", "split": "test"}
    b["roles"] = {"asker": "user", "gpt": "assistant"}
    assert "content_tag" in text
    assert "role_tag" not in text
    columns = {"instruction": "question", "system": "rules"}
    assert run.datasets["sft"] == [{"path": "mine/a.jsonl", "rows": 5, "columns": columns}, b]
    assert run.eval_datasets == {"sft": b}
    assert "dataset" not in notes(text)
    run, text = migrated(a=FACTORY | {"dataset_dir": "ONLINE", "dataset": "org/c", "max_samples": None})
    assert run.datasets["sft"] == {"path": "org/c", "eval_split": 0.1}
    assert "dataset" not in notes(text)


def test_what_llama_factory_has_and_a_run_has_not_is_named_or_refused(migrated, refusal):
    _, text = migrated(a=FACTORY | {"finetuning_type": "freeze", "galore_rank": 3, "lora_rank": 8})
    assert {"finetuning_type", "galore_rank", "lora_rank"} <= notes(text).keys()
    _, text = migrated(a=FACTORY | {"stage": "dpo", "pref_loss": "simpo"})
    assert notes(text)["pref_loss"] == "TRL's DPOTrainer has no such loss."
    run, text = migrated(a=FACTORY | {"stage": "ppo", "reward_model": "saves/rm", "ppo_epochs": 2, "top_p": 0.9})
    assert (run.config.ppo["num_ppo_epochs"], run.config.ppo["top_p"]) == (2, 0.9)
    assert "value head" in notes(text)["reward_model"]
    assert "`ppo` has no such option" in notes(text)["cutoff_len"]
    _, text = migrated("ppo.yaml", "rm.yaml", rm=FACTORY | {"stage": "rm"}, ppo=FACTORY | {"stage": "ppo"})
    assert "value head" in text
    assert "a.yaml trains 'pt', which is no objective of a run (sft," in refusal(a=FACTORY | {"stage": "pt"})


# --- axolotl ---------------------------------------------------------------------------------------------------------

AXOLOTL = {
    "base_model": "llama",
    "adapter": "qlora",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "datasets": [{"path": "org/a", "type": "alpaca"}],
    "val_set_size": 0.1,
    "output_dir": "./outputs/sft",
    "sequence_len": 2048,
    "sample_packing": True,
    "micro_batch_size": 2,
    "num_epochs": 3,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 2e-4,
    "bf16": "auto",
    "flash_attention": True,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "wandb_project": "mine",
    "wandb_name": "first",
    "special_tokens": {"pad_token": "<pad>"},
    "chat_template": "llama3",
}


def test_files_of_axolotl_become_a_run(migrated):
    part = {"path": "org/b", "type": "chat_template.default", "field_messages": "conversation", "ds_type": "json"}
    part |= {"roles": {"user": ["human", "user"]}, "shards": 3}
    dpo = AXOLOTL | {"rl": "ipo", "rl_beta": 0.3, "datasets": [part], "lora_model_dir": "outputs/sft"}
    del dpo["sample_packing"]
    run, text = migrated(a=AXOLOTL, b=dpo | {"output_dir": "outputs/dpo"})
    assert run.config.objectives == ["sft", "dpo"]
    assert run.datasets["sft"] == {"path": "org/a", "eval_split": 0.1}
    assert run.datasets["dpo"] == {
        "path": "org/b",
        "columns": {"messages": "conversation"},
        "eval_split": 0.1,
    }
    assert run.peft == {"r": 32, "lora_alpha": 16, "target_modules": "all-linear"}
    assert run.quantization == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    assert run.config.sft == {
        "packing": True,
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "cosine",
        "learning_rate": 2e-4,
        "save_strategy": "epoch",
    }
    assert (run.config.dpo["loss_type"], run.config.dpo["beta"]) == ("ipo", 0.3)
    assert (run.env, run.config.report_to, run.config.run_name) == ({"WANDB_PROJECT": "mine"}, "wandb", "first")
    left = {"special_tokens", "chat_template", "evals_per_epoch", "train_on_inputs"}
    left |= {"datasets.shards", "datasets.roles"}
    assert notes(text).keys() == left


@pytest.mark.parametrize(
    ("values", "kind", "section"),
    [
        ({"rl": "kto", "kto_desirable_weight": 0.2}, "kto", {"desirable_weight": 0.2}),
        ({"rl": "dpo", "rpo_alpha": 0.1}, "dpo", {"loss_weights": [1.0, 0.1]}),
        ({"rl": "grpo", "trl": {"num_generations": 4, "reward_funcs": ["r.f"]}}, "grpo", {"num_generations": 4}),
        ({"saves_per_epoch": 4}, "sft", {"lr_scheduler_type": "cosine"}),
        ({"group_by_length": True}, "sft", {}),
    ],
)
def test_an_objective_of_axolotl_becomes_that_of_the_run(migrated, values, kind, section):
    plain = {key: value for key, value in AXOLOTL.items() if key != "sample_packing"}
    run, text = migrated(a=plain | values)
    assert run.config.objectives == [kind]
    assert section.items() <= getattr(run.config, kind).items()
    assert ("saves_per_epoch" in notes(text)) == ("saves_per_epoch" in values)


def test_a_run_is_uploaded_where_the_last_file_says(migrated):
    names = [{"push_to_hub": True, "hub_model_id": f"me/{name}"} for name in ("sft", "dpo")]
    run, text = migrated(sft=SFT | names[0], dpo=DPO | names[1])
    assert (run.push_to_hub, run.hub_model_id) == (True, "me/dpo")
    assert "me/sft" in text
    run, _ = migrated(sft=SFT | names[0], dpo=DPO | {"hub_model_id": "me/dpo"})
    assert (run.push_to_hub, run.hub_model_id) == (False, None)


@pytest.mark.slow
def test_a_migrated_run_without_a_penalty_ends_with_the_weights_of_the_commands_of_trl(folder, migrated):
    run_files.save_model("model")
    plain = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "use_cpu": True,
    }
    plain |= {"bf16": False, "report_to": "none"}
    given, start = {}, "model"
    for index, (kind, rows) in enumerate({"sft": cases.sft_rows(16), "dpo": cases.preference_rows(16)}.items()):
        rows.to_json(f"{kind}.jsonl")
        data = {"datasets": [{"path": "json", "data_files": f"{kind}.jsonl"}]}
        given[kind] = plain | data | {"model_name_or_path": start, "output_dir": f"trl-{kind}"}
        file = folder / f"plain-{kind}.yaml"
        file.write_text(yaml.safe_dump(given[kind] | {"seed": 42 + index}))  # as stages are seeded
        subprocess.run([sys.executable, "-m", f"trl.scripts.{kind}", "--config", str(file)], check=True)
        start = f"trl-{kind}"
    migrated(**given)
    words = ["--num_rounds", "1", "--ewc", "null", "--output_dir", "out", "--disable_tqdm"]
    assert main(["train", "--config", "run.yaml", *words]) == 0
    expected, found = (load_file(f"{place}/model.safetensors") for place in ("trl-dpo", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- the file and its errors -----------------------------------------------------------------------------------------


def test_no_secret_is_written_and_no_value_leaves_its_comment(migrated):
    end = "<|im_end|>"
    odd = {"hub_token": "hf_secret", "wandb_api_key": "s3cret", "no\nkey: 1": "a\nmodel_name_or_path: evil\u2028x: 1"}
    run, text = migrated(sft=SFT | odd | {"push_to_hub": True, "eos_token": end})
    assert "secret" not in text
    assert "s3cret" not in text
    assert run.model_name_or_path == SFT["model_name_or_path"]
    assert run.config.sft["eos_token"] == end
    assert {"hub_token", "wandb_api_key"} <= notes(text).keys()
    assert not any(line[:1] not in {"#", "", " ", "-"} and ":" not in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"sft": {"dataset_name": "d"}}, ["sft.yaml names no model"]),
        ({"sft": {"model_name_or_path": "m"}}, ["sft.yaml names no training data"]),
        ({"sft": SFT, "sft_b": SFT}, ["train sft and sft", "each once"]),
        ({"reward": SFT}, ["train only reward models"]),
        ({"sft": SFT | {"datasets": {"sft": "a"}}}, ["`datasets` of sft.yaml is {'sft': 'a'}", "a list of mappings"]),
    ],
)
def test_files_that_make_no_run_are_refused(refusal, files, parts):
    files = {name: {key: value for key, value in values.items() if key != "packing"} for name, values in files.items()}
    message = refusal(**files)
    for part in parts:
        assert part in message


KEYS = st.sampled_from([
    *PLACES,
    *REASONS,
    *RENAMED,
    "datasets",
    "dataset",
    "stage",
    "rl",
    "adapter",
    "trl",
    "rpo_alpha",
])


@fixed(max_examples=200)
@given(
    st.sampled_from([SFT, DPO, FACTORY, AXOLOTL]),
    st.dictionaries(KEYS, JUNK.filter(lambda value: not isinstance(value, bytes)), max_size=4),
)
def test_any_values_become_a_run_or_are_refused_in_one_line(tmp_path_factory, plain, values):
    file = tmp_path_factory.mktemp("any") / "sft.yaml"
    try:
        file.write_text(yaml.safe_dump(plain | values))
    except ValueError:  # Python writes no number of 400 digits
        return
    try:
        text = migrate([str(file)])
    except (ValueError, TypeError) as error:
        one_line(error)
    else:
        (file.parent / "run.yaml").write_text(text)
        parse(file.parent / "run.yaml")


def test_a_migrated_run_is_ready_to_train(migrated, folder, capsys):
    run_files.save_model("model")
    cases.sft_rows(8).to_json("sft.jsonl")
    cases.preference_rows(8).to_json("dpo.jsonl")
    files = {
        kind: {
            "model_name_or_path": start,
            "datasets": [{"path": "json", "data_files": f"{kind}.jsonl"}],
            "output_dir": f"out/{kind}",
            "use_cpu": True,
            "bf16": False,
            "max_length": 64,
            "use_peft": True,
            "lora_target_modules": ["q_proj"],
        }
        for kind, start in {"sft": "model", "dpo": "out/sft"}.items()
    }
    migrated(**files)
    assert main(["validate", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    assert "1 round of sft, dpo: 2 stages" in capsys.readouterr().out


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_run_file_and_nothing_else(folder, capsys):
    (folder / "sft.yaml").write_text(yaml.safe_dump(SFT))
    assert main(["migrate", "sft.yaml"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (migrate(["sft.yaml"]), "")
    for words, says in {("none.yaml",): "does not exist", ("sft.yaml", "--fast"): "`--fast` is not an option"}.items():
        assert main(["migrate", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("hbat: error: ")
        assert says in captured.err
