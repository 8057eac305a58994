"""What PPO requires of model, tokenizer, prompts and engine, checked when the trainer is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from hbat.data.check import check_dataset
from hbat.data.formats import prompt_faults
from hbat.model.adapters import refuse_adapters
from hbat.model.load import (
    add_adapter,
    keep_differentiable,
    load_language_model,
    load_tokenizer,
    require_adapter_parameters,
    require_trainable,
)
from hbat.ppo.config import PPOConfig
from hbat.ppo.engine import refuse_arguments, refuse_base, refuse_policy
from hbat.ppo.rollouts.prompts import TOKENS, check_lengths, context_length, tokenize_prompts


def prepare(
    model: Any, args: PPOConfig, train_dataset: Dataset, processing_class: Any, peft_config: Any
) -> tuple[Any, Any, Dataset]:
    """Load what is given by name and check that everything fits: policy, tokenizer and tokenized prompts."""
    policy = _load_policy(model, args, peft_config)
    tokenizer = _checked(load_tokenizer(processing_class, policy, origin=model), policy, args)
    prompts = _tokenized(train_dataset, "train_dataset", policy, tokenizer, args)
    needed = args.rollout_size * args.world_size
    if len(prompts) < needed:
        processes = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ValueError(
            f"train_dataset has {len(prompts)} rows, but a rollout takes {args.rollout_size} prompts{processes}. "
            "Lower `rollout_batch_size` (or `per_device_train_batch_size` and `gradient_accumulation_steps`), or add "
            "rows."
        )
    return policy, tokenizer, prompts


def prepare_rows(rows: Any, policy: Any, tokenizer: Any, args: PPOConfig) -> Any:
    """Tokenize and check evaluation prompts, a data set or several by name, unless they are tokenized."""
    if isinstance(rows, Mapping):
        return {name: prepare_rows(dataset, policy, tokenizer, args) for name, dataset in rows.items()}
    if rows is None or TOKENS in getattr(rows, "column_names", ()):
        return rows
    return _tokenized(rows, "eval_dataset", policy, tokenizer, args)


def _load_policy(model: Any, args: PPOConfig, peft_config: Any) -> Any:
    if not isinstance(args, PPOConfig):
        raise TypeError(f"`args` is a {type(args).__name__}; pass a `PPOConfig`.")
    refuse_arguments(args)
    if isinstance(model, str | Path):
        model = load_language_model(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; pass a name, a path or a model.")
    if peft_config is not None:
        refuse_base(model)
        model = add_adapter(model, peft_config, args.seed)
    refuse_adapters(model, takes_reference=True)
    refuse_policy(args, model)
    require_trainable(model)
    keep_differentiable(model)
    if args.kl_coef > 0:
        require_adapter_parameters(model)
    return model


def _checked(tokenizer: Any, policy: Any, args: PPOConfig) -> Any:
    if tokenizer.eos_token_id is None and not {"eos_token_id", "stop_strings"} & (args.generation_kwargs or {}).keys():
        raise ValueError(
            "The tokenizer has no EOS token, so no completion would ever end by itself. Set its `eos_token`, or "
            "`generation_kwargs` with `eos_token_id` or `stop_strings`."
        )
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the policy only {rows} embeddings. Use the model's own "
            "tokenizer, or resize the embeddings."
        )
    return tokenizer


def _tokenized(rows: Any, name: str, policy: Any, tokenizer: Any, args: PPOConfig) -> Dataset:
    checked, _ = check_dataset(rows, name=name, faults=prompt_faults, on_bad_rows=None)
    prompts = tokenize_prompts(checked, tokenizer, args.chat_template_kwargs)
    context = context_length(policy.config)
    check_lengths(prompts, name=name, completion_length=args.max_completion_length, context=context)
    return prompts
