"""Where keys of TRL's commands, of LLaMA-Factory and of axolotl stand in a run, or why they do not."""

from collections.abc import Sequence

from hbat.config.section_fields import OBJECTIVES, section_fields

#: Arguments of a stage that belong to the run, and what to set instead.
OWNED_BY_RUN = {
    "output_dir": "every stage has its own folder inside the run's. Set the run's `output_dir`.",
    "report_to": "one set of reporters serves the whole run. Set the run's `report_to`.",
    "run_name": "one set of reporters serves the whole run. Set the run's `run_name`.",
    "push_to_hub": "stages are not pushed. Set the run's `push_to_hub`, or call `HBATTrainer.push_to_hub` after "
    "training.",
    "resume_from_checkpoint": "the run resumes as a whole. Give `hbat train --resume`, or pass "
    "`resume_from_checkpoint` to `HBATTrainer.train`.",
    "load_best_model_at_end": "the next stage starts from the end of this one. `hbat front` chooses a point "
    "of the last stage after training.",
    "model_init_kwargs": "the model is loaded once for all stages. Set the run's `model_init_kwargs`.",
    "cast_lm_head_to_fp32": "it changes the model for all later stages. Load the model in float32.",
    "sync_ref_model": "the reference policy is the model at the start of the stage. More rounds renew it more often.",
}

#: Place of a key that is not a field of TRL's training arguments. `*` stands for an objective; after `; ` a remark.
PLACES = {
    **{key: key for key in ("model_name_or_path", "tokenizer_name_or_path", "output_dir", "overwrite_output_dir")},
    **{key: key for key in ("report_to", "run_name", "disable_tqdm", "chat_template", "env", "reward_funcs")},
    **{key: key for key in ("push_to_hub", "hub_model_id", "hub_private_repo")},
    "dataset_name": "datasets.*",
    "dataset_config": "datasets.*.name",
    "dataset_train_split": "datasets.*.split",
    "dataset_test_split": "eval_datasets.*.split",
    "test_split_size": "datasets.*.eval_split",
    "fraction": "datasets.*.weight; it stands at each part of a mixture",
    "max_samples": "datasets.*.rows",
    "eval_strategy": "*.eval_strategy; every objective is scored on its `eval_datasets` after every stage as well",
    "model_init_kwargs": "model_init_kwargs",
    "model_revision": "model_init_kwargs.revision",
    **{key: f"model_init_kwargs.{key}" for key in ("dtype", "attn_implementation", "trust_remote_code")},
    "use_peft": "peft; `peft: {}` is an adapter with PEFT's defaults",
    **{f"lora_{key}": f"peft.{key}" for key in ("r", "task_type", "target_modules", "target_parameters")},
    "lora_modules_to_save": "peft.modules_to_save",
    **{key: f"peft.{key}" for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")},
    **{key: f"quantization.{key}" for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype")},
    **{key: f"quantization.{key}" for key in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage")},
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "reward_model_name_or_path": "reward_funcs",
    "wandb_project": "env.WANDB_PROJECT",
    "wandb_entity": "env.WANDB_ENTITY",
}

_NOT_STREAMED = "all rows are checked and split into `num_rounds` parts, so none are streamed."
_SCORED = "every objective is scored on its `eval_datasets` after every stage."
_OF_MODEL = "the class follows from the model."
#: Why a key has no place.
REASONS = {
    "dataset_streaming": _NOT_STREAMED,
    "streaming": _NOT_STREAMED,
    "ignore_bias_buffers": "it is a workaround of TRL's scripts for models with such buffers.",
    "do_train": "`hbat train` trains.",
    "do_eval": _SCORED,
    "evals_per_epoch": _SCORED,
    "logging_dir": "the logs lie in `output_dir`.",
    "max_prompt_length": "TRL no longer has it. `max_length` cuts a row as a whole.",
    "rpo_alpha": "TRL now adds the SFT loss with `loss_type: [sigmoid, sft]` and `loss_weights: [1.0, ALPHA]`.",
    "ref_model": "the reference policy is the model at the start of the stage.",
    "template": "texts are made by the tokenizer's own chat template. `chat_template` sets another one.",
    "special_tokens": "they are the tokenizer's. `chat_template` takes over those of another tokenizer.",
    "model_type": _OF_MODEL,
    "tokenizer_type": _OF_MODEL,
}

#: Other names of these keys or of fields: older ones of TRL and transformers, those of LLaMA-Factory and of axolotl.
RENAMED = {
    "torch_dtype": "dtype", "max_seq_length": "max_length", "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu", "warmup_ratio": "warmup_steps", "group_by_length": "train_sampling_strategy",
    "reward_model_path": "reward_model_name_or_path", "response_length": "max_completion_length",
    # LLaMA-Factory
    "cutoff_len": "max_length", "lora_rank": "lora_r", "lora_target": "lora_target_modules",
    "additional_target": "lora_modules_to_save", "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "use_bnb_nested_quant", "flash_attn": "attn_implementation",
    "enable_liger_kernel": "use_liger_kernel", "preprocessing_num_workers": "dataset_num_proc",
    "neat_packing": "packing", "val_size": "test_split_size", "pref_beta": "beta", "pref_loss": "loss_type",
    "pref_ftx": "rpo_alpha", "dpo_label_smoothing": "label_smoothing", "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight", "ppo_epochs": "num_ppo_epochs",
    "ppo_whiten_rewards": "whiten_rewards", "reward_model": "reward_model_name_or_path",
    "max_new_tokens": "max_completion_length",
    # axolotl
    "base_model": "model_name_or_path", "tokenizer_config": "tokenizer_name_or_path",
    "revision_of_model": "model_revision", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
    "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs", "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim", "sample_packing": "packing", "eval_sample_packing": "eval_packing",
    "dataset_processes": "dataset_num_proc", "val_set_size": "test_split_size", "rl_beta": "beta",
    "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
    "dpo_use_weighting": "use_weighting", "wandb_name": "run_name",
}  # fmt: skip


def places(key: str, objectives: Sequence[str]) -> tuple[list[str], str]:
    """Find where a key of another tool stands in a run.

    Args:
        key: The key.
        objectives: Objectives of the run. A field of none of them is looked for in all others.

    Returns:
        Dotted keys, and a remark. Without keys it says why there are none, and is empty if the key is unknown.
    """
    if key in PLACES:
        place, _, remark = PLACES[key].partition("; ")
        return [place.replace("*", name) for name in objectives] if "*" in place else [place], remark
    reason = REASONS.get(key) or OWNED_BY_RUN.get("push_to_hub" if key.startswith("hub_") else key)
    if reason:
        return [], reason
    having = [name for name in OBJECTIVES if objectives and key in section_fields(name)]
    if having:
        return [f"{name}.{key}" for name in [name for name in having if name in objectives] or having], ""
    return places(RENAMED[key], objectives) if key in RENAMED else ([], "")


def hint(key: str, objectives: Sequence[str] = ()) -> str:
    """Say where a key of another tool stands, to follow "is not an option"; empty if it is unknown."""
    found, remark = places(key, objectives)
    if not found:
        return f": {remark}" if remark else ""
    *first, last = (f"`{place}`" for place in found)
    where = f"{', '.join(first)} and {last}" if first else last
    return f". Set {where}{f'; {remark}' if remark else ''}."


def is_misplaced(section: str, key: str) -> bool:
    """Whether a key in a section is known to belong elsewhere, or nowhere."""
    place = PLACES.get(key, "")
    if key not in {*PLACES, *REASONS, *RENAMED} or place == f"{section}.{key}" or place.startswith("*."):
        return False
    known = section_fields(section)
    return key not in known and (bool(known) or section not in OBJECTIVES)
