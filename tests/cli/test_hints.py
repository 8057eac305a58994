"""Keys of TRL, LLaMA-Factory and axolotl are answered with where they belong, all of them in one message."""

import copy
import dataclasses
import enum
import re

import pytest
import trl
import yaml
from transformers import TrainingArguments
from trl import DatasetMixtureConfig as MixtureConfig
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, RLOOConfig, ScriptArguments, SFTConfig

from hbat.cli.build import check_sections, peft_config, quantization_config
from hbat.cli.run_file import described_keys, parse, parse_overrides
from hbat.config.fields import build_section
from hbat.config.foreign import PLACES, REASONS, RENAMED, places
from hbat.config.section_fields import OBJECTIVES, section_fields
from hbat.objectives.sft import SFT
from hbat.ppo.config import PPOConfig

MINIMAL = {
    "model_name_or_path": "model",
    "output_dir": "out",
    "datasets": {"sft": {"path": "a"}, "dpo": {"path": "b"}},
}
CONFIGS = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
}
if hasattr(trl, "DistillationConfig"):
    CONFIGS["distillation"] = trl.DistillationConfig


def default(field):
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else None if value is dataclasses.MISSING else value


def defaults(*configs):
    return {field.name: default(field) for config in configs for field in dataclasses.fields(config) if field.init}


#: Every flat key of `trl sft` and `trl dpo` that is none of a run.
FLAT = defaults(ScriptArguments, ModelConfig, MixtureConfig, SFTConfig, DPOConfig)
FLAT = {key: value for key, value in FLAT.items() if key not in {field.name for field in described_keys()}}


@pytest.fixture
def refusal(tmp_path):
    """Parse a run with more values and words of the command line; returns what is wrong with it."""

    def refuse(values=None, *words, **more):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(MINIMAL | (values or {}) | more, sort_keys=False))
        with pytest.raises(ValueError, match=r"is not an option|must be a mapping") as caught:
            parse(file, parse_overrides(words))
        return str(caught.value)

    return refuse


def suggested(message):
    """Keys that the first sentence after the refusal says to set."""
    found = re.match(r"`\S+` is not an option\. Set ([^;.]*(?:\.\w[^;.]*)*)", message)
    return re.findall(r"`([\w.]+)`", found[1]) if found else []


def put(values, key, value):
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values.setdefault(last, value)


def test_every_flat_key_of_trl_is_answered_with_a_place_that_is_accepted_or_a_reason(refusal, tmp_path):
    values = {**copy.deepcopy(MINIMAL), "use_cpu": True}
    for key, value in FLAT.items():
        message = refusal({key: "x"})
        assert message == refusal(None, f"--{key}", "x").replace("`--", "`", 1).partition(" `hbat migrate")[0] + (
            f" `hbat migrate {tmp_path / 'run.yaml'}` makes a run file of one for TRL, LLaMA-Factory or axolotl."
        )
        found = suggested(message)
        reason = places(key, ["sft", "dpo"])[1]
        assert found or (reason and f"`{key}` is not an option: {reason}" in message), message
        for place in found:
            section, _, name = place.partition(".")
            own = defaults(CONFIGS[section])[name] if section in CONFIGS else value
            put(values, place, {} if key == "use_peft" else own)
    file = tmp_path / "applied.yaml"
    file.write_text(yaml.safe_dump(values))
    run = parse(file)
    assert set(check_sections(run)) == {"sft", "dpo"}
    assert peft_config(run).r == ModelConfig.lora_r
    assert quantization_config(run).bnb_4bit_quant_type == "nf4"
    assert run.datasets["sft"].keys() >= {"path", "name", "split", "eval_split"}
    assert run.config.model_init_kwargs.keys() >= {"dtype", "revision", "attn_implementation"}


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("lora_r", "Set `peft.r`."),
        ("lora_target_modules", "Set `peft.target_modules`."),
        ("torch_dtype", "Set `model_init_kwargs.dtype`."),
        ("model_revision", "Set `model_init_kwargs.revision`."),
        ("load_in_4bit", "Set `quantization.load_in_4bit`."),
        ("use_bnb_nested_quant", "Set `quantization.bnb_4bit_use_double_quant`."),
        ("use_peft", "`peft: {}`"),
        ("dataset_name", "Set `datasets.sft` and `datasets.dpo`."),
        ("dataset_train_split", "Set `datasets.sft.split` and `datasets.dpo.split`."),
        ("dataset_test_split", "Set `eval_datasets.sft.split` and `eval_datasets.dpo.split`."),
        ("fraction", "`datasets.sft.weight`"),
        ("dataset_streaming", "none are streamed"),
        ("learning_rate", "Set `sft.learning_rate` and `dpo.learning_rate`."),
        ("save_strategy", "Set `sft.save_strategy` and `dpo.save_strategy`."),
        ("packing", "Set `sft.packing`."),
        ("beta", "Set `dpo.beta`."),
        ("num_generations", "Set `grpo.num_generations` and `rloo.num_generations`."),
        ("eval_strategy", "scored on its `eval_datasets` after every stage"),
        ("resume_from_checkpoint", "`hbat train --resume`"),
        ("hub_strategy", "Set the run's `push_to_hub`"),
        ("logging_dir", "the logs lie in `output_dir`"),
        # LLaMA-Factory and axolotl
        ("cutoff_len", "Set `sft.max_length` and `dpo.max_length`."),
        ("lora_rank", "Set `peft.r`."),
        ("pref_beta", "Set `dpo.beta`."),
        ("base_model", "Set `model_name_or_path`."),
        ("micro_batch_size", "Set `sft.per_device_train_batch_size` and `dpo.per_device_train_batch_size`."),
    ],
)
def test_a_flat_key_is_answered_with_where_it_belongs(refusal, key, answer):
    assert answer in refusal({key: "x"})
    assert answer in refusal(None, f"--{key.replace('_', '-')}", "x")


@pytest.mark.parametrize(
    ("section", "key", "answer"),
    [
        ("sft", "use_peft", "Set `peft`; `peft: {}`"),
        ("peft", "lora_r", "Set `peft.r`."),
        ("quantization", "use_bnb_nested_quant", "Set `quantization.bnb_4bit_use_double_quant`."),
        ("dpo", "rpo_alpha", "`loss_type: [sigmoid, sft]` and `loss_weights: [1.0, ALPHA]`"),
        ("dpo", "ref_model", "the reference policy is the model at the start of the stage"),
        ("dpo", "max_prompt_length", "`max_length` cuts a row as a whole"),
        ("sft", "max_seq_length", "Set `sft.max_length`."),
        ("dpo", "dataset_name", "Set `datasets.dpo`."),
    ],
)
def test_a_key_in_the_wrong_section_is_answered_with_where_it_belongs(refusal, section, key, answer):
    message = refusal({section: {key: 1}})
    assert message.startswith(f"`{section}.{key}` is not an option")
    assert answer in message


def test_the_answer_names_the_objectives_of_the_run(refusal):
    run = {"objectives": ["sft", "kto"], "datasets": {"sft": "a", "kto": "b"}}
    assert "Set `sft.learning_rate` and `kto.learning_rate`." in refusal(run, learning_rate=1)
    assert "Set `kto.beta`." in refusal(run, beta=1)
    assert "Set `datasets.kto`." in refusal(run, "--objectives", "[kto]", "--dataset_name", "x")


def test_all_wrong_keys_are_named_in_one_message(refusal):
    values = {
        "lora_r": 8,
        "num_round": 3,
        "streaming": True,
        "datasets": [{"path": "a"}],
        "sft": {"use_peft": True, "dataset_name": "a"},
        "peft": {"lora_r": 4, "lora_alpha": 2},
    }
    message = refusal(values, "--dtype", "bfloat16", "--resum")
    named = re.findall(r"`([-\w.]+)` is (?:not an option|\[)", message)
    assert named == [
        "--dtype", "--resum", "lora_r", "num_round", "streaming", "sft.use_peft", "sft.dataset_name", "peft.lora_r",
        "datasets",
    ]  # fmt: skip
    assert "Set `datasets.sft` to this list." in message
    assert message.endswith("makes a run file of one for TRL, LLaMA-Factory or axolotl.")


def test_a_key_that_is_unknown_everywhere_is_answered_with_the_nearest(refusal):
    assert refusal({"num_round": 3}) == "`num_round` is not an option. Did you mean `num_rounds`?"
    assert refusal(None, "--sfd.beta", "1") == "`--sfd.beta` is not an option. Did you mean `sft`?"
    assert refusal({"zzz": 3}) == "`zzz` is not an option."


def test_fields_that_belong_in_a_section_are_not_taken_for_misplaced(tmp_path):
    file = tmp_path / "run.yaml"
    inner = {"eval_strategy": "no", "trust_remote_code": False, "disable_tqdm": True, "model_init_kwargs": None}
    known = {key: value for key, value in inner.items() if key in section_fields("sft")}
    file.write_text(yaml.safe_dump({**MINIMAL, "sft": known, "peft": {"lora_alpha": 3, "use_dora": True}}))
    assert parse(file).config.sft == known


def test_a_section_names_all_its_wrong_keys_with_where_they_belong():
    values = {"use_peft": True, "lerning_rate": 1, "report_to": "wandb", "max_length": 8}
    with pytest.raises(ValueError, match="is not an option") as caught:
        SFT(config=values).base_args("out")
    assert re.findall(r"`(sft\.\w+)`", str(caught.value)) == ["sft.use_peft", "sft.lerning_rate", "sft.report_to"]
    assert "Set `peft`" in str(caught.value)
    assert "Did you mean `learning_rate`?" in str(caught.value)


def test_arguments_of_a_trainer_of_ones_own_are_not_sent_to_other_sections():
    with pytest.raises(ValueError, match=r"^`mine\.beta` is not an option\.( Did you mean `\w+`\?)?$"):
        build_section("mine", TrainingArguments, {"beta": 1})


@pytest.mark.parametrize("name", [*CONFIGS, "reward"])
def test_the_fields_of_a_section_are_read_as_they_are_in_the_installed_libraries(name):
    config = {**CONFIGS, "reward": RewardConfig}[name]
    assert section_fields(name) == {field.name for field in dataclasses.fields(config) if field.init}


def test_every_other_name_leads_to_a_place_or_a_reason():
    for key in RENAMED:
        found, remark = places(key, OBJECTIVES)
        assert found or remark, key
    assert not set(PLACES) & set(REASONS)
    assert not set(RENAMED) & {*PLACES, *REASONS}
