"""What a run refuses, before its first stage and with a message that says what to do."""

import logging
import pkgutil

import cases
import pytest
import runs
import torch
import trl
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, LlamaForCausalLM

from hbat.config.hbat import HBATConfig
from hbat.objectives.objective import Objective
from hbat.objectives.sft import SFT
from hbat.trainer import HBATTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def with_nan():
    model = cases.tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    return model


def with_adapter(name):
    return get_peft_model(cases.tiny_llama(), LORA, adapter_name=name)


def loaded_for_inference(folder):
    get_peft_model(cases.tiny_llama(), LORA).save_pretrained(folder)
    return PeftModel.from_pretrained(cases.tiny_llama(), folder)


def streamed():
    return IterableDataset.from_generator(lambda: iter([{"prompt": "a", "completion": "b"}]))


BY_LENGTH = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(trl.SFTConfig, "train_sampling_strategy")
    else {"group_by_length": True}  # its name before transformers 5
)
CONFIGURATION_ERRORS = {
    "unknown objective": ({"objectives": ["sft", "dpoo"]}, ValueError, r"'dpoo'.*not built in.*Did you mean `dpo`"),
    "objective of a wrong kind": ({"objectives": ["sft", trl.DPOTrainer]}, TypeError, r"`objectives` holds a type"),
    "same name twice": ({"objectives": ["sft", SFT(config=runs.section())]}, ValueError, r"a name of its own"),
    "negative strength": ({"ewc": {"strength": -1.0}}, ValueError, r"`ewc\.strength` is -1\.0.*at least 0"),
    "unknown key": ({"sft": {"learning_rat": 1}}, ValueError, r"`sft\.learning_rat`.*Did you mean `learning_rate`"),
    "text for a number": ({"dpo": {"beta": "strong"}}, TypeError, r"`dpo\.beta` is 'strong'.*a number"),
    "value refused by transformers": (
        {"dpo": {"save_strategy": "often"}},
        ValueError,
        r"`dpo\.save_strategy`: '?often'? is not",
    ),
    "folder of a stage": ({"sft": {"output_dir": "x"}}, ValueError, r"`sft\.output_dir` cannot.*own folder"),
    "reporter of a stage": ({"dpo": {"report_to": "wandb"}}, ValueError, r"`dpo\.report_to` cannot.*whole run"),
    "moving reference": ({"dpo": {"sync_ref_model": True}}, ValueError, r"`dpo\.sync_ref_model` cannot"),
    "best checkpoint": ({"sft": {"load_best_model_at_end": True}}, ValueError, r"`sft\.load_best_model_at_end` can"),
    "schedule by evaluation": (
        {"sft": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}},
        ValueError,
        r"`sft\.lr_scheduler_type`.*evaluations",
    ),
    "sampling that the trainer's rows do not have": (
        {"dpo": BY_LENGTH},
        ValueError,
        r"The trainer of 'dpo' cannot .*infer lengths",
    ),
    "last batch dropped": (
        {"sft": {"dataloader_drop_last": True, "per_device_train_batch_size": 5}},
        ValueError,
        r"train_dataset\['sft'\] has too few rows: 8 for 2 rounds; every round needs at least 5 rows",
    ),
    "stop without evaluation": (
        {"callbacks": {"sft": [EarlyStoppingCallback()]}},
        ValueError,
        r"`EarlyStoppingCallback` for 'sft', which needs `sft\.eval_strategy` and `sft\.metric_for_best_model`",
    ),
    "evaluation of no rows": (
        {"sft": {"eval_strategy": "epoch"}},
        ValueError,
        r"`sft\.eval_strategy` is 'epoch', but `eval_dataset` .* has no rows for 'sft'",
    ),
    "callbacks of no objective": ({"callbacks": {"ppo": []}}, ValueError, "`callbacks` has the key 'ppo', which no"),
    "one stage sharded": ({"sft": {"fsdp": "full_shard"}}, (NotImplementedError, ValueError), r"FSDP1|`fsdp` dif"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("options", "error", "message"), CONFIGURATION_ERRORS.values(), ids=CONFIGURATION_ERRORS)
def test_a_configuration_that_cannot_work_is_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        runs.build_run(cases.tiny_llama(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


READY = {
    "of another class": (trl.DPOConfig, {}, TypeError, "`sft` is a DPOConfig; it must be a SFTConfig"),
    "with the best checkpoint": (
        trl.SFTConfig,
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        ValueError,
        r"`sft\.load_best_model_at_end` cannot",
    ),
}


@pytest.mark.parametrize(("config_class", "options", "error", "message"), READY.values(), ids=READY)
def test_a_ready_configuration_is_checked_too(config_class, options, error, message, tmp_path):
    ready = config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
    config = HBATConfig(output_dir=str(tmp_path / "run"), num_rounds=1, sft=ready, dpo=runs.section())
    with pytest.raises(error, match=message):
        HBATTrainer(cases.tiny_llama(), config, runs.rows(), processing_class=cases.tiny_tokenizer())


PACKAGES = {
    "liger": (
        {"dpo": {"use_liger_kernel": True}},
        r"`dpo\.use_liger_kernel` is set, but liger-kernel is not installed",
    ),
    "a tracker": ({"report_to": "comet_ml"}, r"`report_to` has 'comet_ml', which cannot be used: .*comet"),
    "one of two trackers": ({"report_to": ["tensorboard", "swanlab"]}, r"`report_to` has 'swanlab'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("options", "message"), PACKAGES.values(), ids=PACKAGES)
def test_a_package_that_an_option_needs_is_missed_before_the_first_step(options, message, tmp_path):
    installed = {"liger_kernel", "comet_ml", "swanlab"} & {module.name for module in pkgutil.iter_modules()}
    if installed:
        pytest.skip(f"{installed} is installed")
    with pytest.raises(ImportError, match=message):
        runs.build_run(cases.tiny_llama(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_rehearsal_takes_no_processes_for_its_row(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    runs.build_run(cases.tiny_llama(), tmp_path, sft={"dataset_num_proc": 4})
    assert "num_proc" not in caplog.text


@pytest.mark.parametrize("report_to", ["none", None, [], "all"])
def test_a_run_without_trackers_or_with_all_that_are_installed_needs_no_other(report_to, tmp_path):
    runs.build_run(cases.tiny_llama(), tmp_path, report_to=report_to, num_rounds=1)


DATA_ERRORS = {
    "missing": ({"sft": cases.sft_rows(4)}, ValueError, r"no rows for \['dpo'\]; its keys are \['sft'\]"),
    "unknown key": (runs.rows() | {"dpoo": cases.sft_rows(4)}, ValueError, r"'dpoo', which no stage.*mean `dpo`"),
    "one data set for all": (cases.sft_rows(4), TypeError, r"`train_dataset` is a Dataset; give a mapping"),
    "fewer rows than rounds": (runs.rows() | {"dpo": cases.preference_rows(1)}, ValueError, r"too few rows: 1 for 2"),
    "streamed": (runs.rows() | {"sft": streamed()}, ValueError, r"train_dataset\['sft'\].*IterableDataset"),
    "other columns": (runs.rows() | {"dpo": cases.sft_rows(4)}, ValueError, r"train_dataset\['dpo'\].*no column"),
}


@pytest.mark.parametrize(("data", "error", "message"), DATA_ERRORS.values(), ids=DATA_ERRORS)
def test_data_that_cannot_be_trained_on_is_refused(data, error, message, tmp_path):
    with pytest.raises(error, match=message):
        runs.build_run(cases.tiny_llama(), tmp_path, data=data)


def test_evaluation_data_of_an_unknown_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_dataset` has the key 'kto'"):
        runs.build_run(cases.tiny_llama(), tmp_path, evaluation={"kto": cases.sft_rows(2)})


MODEL_ERRORS = {
    "not a number": (with_nan, "'model.norm.weight' of the model holds NaN"),
    "another adapter name": (lambda: with_adapter("mine"), r"adapters \['mine'\].*'default'"),
    "nothing trainable": (lambda: cases.tiny_llama().requires_grad_(False), "no trainable parameter. Unfreeze"),
}


@pytest.mark.parametrize(("build", "message"), MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_a_model_that_cannot_be_trained_is_refused(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.build_run(build(), tmp_path)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Load the adapter with `is_trainable=True`"):
        runs.build_run(loaded_for_inference(tmp_path / "adapter"), tmp_path / "run")


def test_a_second_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has an adapter already and `peft_config` asks for another"):
        runs.build_run(cases.lora_llama(), tmp_path, peft_config=LORA)


def test_an_adapter_configuration_of_a_wrong_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`peft_config` is a dict"):
        runs.build_run(cases.tiny_llama(), tmp_path, peft_config={"r": 2})


def test_a_model_without_a_name_needs_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="Pass its tokenizer as `processing_class`"):
        HBATTrainer(cases.tiny_llama(), runs.config(tmp_path), runs.rows())


def test_arguments_of_another_class_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` is a SFTConfig; give an `HBATConfig`"):
        HBATTrainer(cases.tiny_llama(), trl.SFTConfig(output_dir=str(tmp_path), bf16=False), runs.rows())


def test_construction_leaves_weights_and_folder_alone(tmp_path):
    model = cases.tiny_llama()
    before = cases.weights(model)
    runs.build_run(model, tmp_path)
    assert runs.same(cases.weights(model), before)
    assert not list(tmp_path.iterdir())


class Hungry(trl.SFTTrainer):
    """A trainer that cannot be built on fewer than three rows."""

    def __init__(self, *args, train_dataset, **kwargs):
        if len(train_dataset) < 3:
            raise ValueError("too few rows")
        super().__init__(*args, train_dataset=train_dataset, **kwargs)


class HungryObjective(Objective):
    def minimum_rows(self, args):
        return args.gradient_accumulation_steps


HUNGRY = HungryObjective(
    name="hungry",
    trainer_class=Hungry,
    config_class=trl.SFTConfig,
    config=runs.section(gradient_accumulation_steps=3),
    greater_is_better=True,
)


def test_a_trainer_that_needs_several_rows_gets_them_wherever_it_is_built(tmp_path):
    options = {"objectives": [HUNGRY], "evaluation": {"hungry": cases.sft_rows(1)}}
    run = runs.build_run(cases.tiny_llama(), tmp_path, data={"hungry": cases.sft_rows(6)}, **options)
    assert run.evaluate()["hungry"]["loss"] > 0
    assert run.matrix.better == {"hungry": "higher"}
    with pytest.raises(ValueError, match="too few rows: 5 for 2 rounds; every round needs at least 3 rows"):
        runs.build_run(cases.tiny_llama(), tmp_path, data={"hungry": cases.sft_rows(5)}, **options)


def test_rewards_reach_the_objective_that_takes_them_or_are_missed(tmp_path):
    class Rewarded(trl.SFTTrainer):
        def __init__(self, *args, reward_funcs, **kwargs):
            super().__init__(*args, **kwargs)
            given.append(reward_funcs)

    given = []
    own = Objective(
        name="mine", trainer_class=Rewarded, config_class=trl.SFTConfig, config=runs.section(), takes_rewards=True
    )
    arguments = {"args": runs.config(tmp_path, objectives=[own]), "train_dataset": {"mine": cases.sft_rows(4)}}
    arguments["processing_class"] = cases.tiny_tokenizer()
    HBATTrainer(cases.tiny_llama(), reward_funcs=len, **arguments)
    assert given == [[len]]
    with pytest.raises(ValueError, match="'mine' learns from rewards, but `reward_funcs` is None"):
        HBATTrainer(cases.tiny_llama(), **arguments)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_one_adapter_is_made_and_goes_through_the_whole_run(tmp_path):
    model = cases.tiny_llama()
    base = cases.weights(model)
    run = runs.build_run(model, tmp_path, peft_config=LORA)
    adapter = run.model
    start = cases.weights(adapter)
    run.train()
    assert run.model is adapter
    assert list(adapter.peft_config) == ["default"]
    assert sum(isinstance(each, PeftModel) for each in adapter.modules()) == 1
    assert not runs.same(cases.weights(adapter), start)
    unloaded = {name: each for name, each in adapter.unload().named_parameters() if name in base}
    assert runs.same({name: each.detach() for name, each in unloaded.items()}, base)


def test_the_seed_of_the_run_makes_the_adapter(tmp_path):
    first, again, other = (
        cases.weights(runs.build_run(cases.tiny_llama(), tmp_path, peft_config=LORA, seed=seed).model)
        for seed in (1, 1, 2)
    )
    assert runs.same(first, again)
    assert not runs.same(first, other)


def test_a_ready_adapter_model_is_trained_as_it_is(tmp_path):
    model = cases.lora_llama()
    assert runs.build_run(model, tmp_path).model is model


@pytest.mark.parametrize("by_section", [False, True])
def test_the_saved_model_stops_at_the_end_token_of_the_tokenizer(by_section, tmp_path):
    tokenizer, model, end = cases.tiny_tokenizer(), cases.tiny_llama(), cases.SPECIAL_TOKENS[2]
    if not by_section:
        tokenizer.eos_token = end
    args = runs.config(tmp_path, sft={"eos_token": end} if by_section else {})
    HBATTrainer(model, args, runs.rows(), processing_class=tokenizer).save_model()
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    # As TRL's and transformers' trainers leave them.
    assert (saved.config.eos_token_id, saved.generation_config.eos_token_id) == (2, [2, 1])
    assert saved.generation_config.pad_token_id == 0


def test_an_objective_of_the_users_own_is_taken_as_it_is(tmp_path):
    rows = cases.sft_rows(4)
    own = Objective(name="mine", trainer_class=trl.SFTTrainer, config_class=trl.SFTConfig, config=runs.section())
    run = runs.build_run(
        cases.tiny_llama(),
        tmp_path,
        objectives=["sft", own],
        data=dict.fromkeys(["sft", "mine"], rows),
    )
    run.train()
    assert {"sft/loss", "mine/loss"} <= {key for each in run.state.log_history for key in each}
