"""What PPO requires of model, tokenizer, prompts and engine, checked when the trainer is built."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from hbat.model.adapters import refuse_adapters
from hbat.model.load import keep_differentiable, load_pretrained, load_tokenizer, require_adapter_parameters
from hbat.ppo.config import PPOConfig
from hbat.ppo.engine import refuse_arguments, refuse_base, refuse_policy
from hbat.ppo.rollouts.prompts import TOKENS, check_lengths, context_length, tokenize_prompts


def prepare(
    model: Any, args: PPOConfig, train_dataset: Dataset, processing_class: Any, peft_config: Any
) -> tuple[Any, Any, Dataset]:
    """Load what is given by name and check that everything fits: policy, tokenizer and tokenized prompts."""
    policy = _load_policy(model, args, peft_config)
    tokenizer = _load_tokenizer(processing_class, policy, args)
    prompts = tokenize_prompts(train_dataset, tokenizer, args.chat_template_kwargs)
    needed = args.rollout_size * args.world_size
    if len(prompts) < needed:
        processes = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ValueError(
            f"train_dataset has {len(prompts)} rows, but a rollout takes {args.rollout_size} prompts{processes}. "
            "Lower `rollout_batch_size` (or `per_device_train_batch_size` and `gradient_accumulation_steps`), or add "
            "rows."
        )
    _check_lengths(prompts, "train_dataset", policy, args)
    return policy, tokenizer, prompts


def prepare_rows(rows: Any, policy: Any, tokenizer: Any, args: PPOConfig) -> Any:
    """Tokenize and check evaluation prompts, a data set or several by name, unless they are tokenized."""
    if isinstance(rows, Mapping):
        return {name: prepare_rows(dataset, policy, tokenizer, args) for name, dataset in rows.items()}
    if rows is None or TOKENS in rows.column_names:
        return rows
    prompts = tokenize_prompts(rows, tokenizer, args.chat_template_kwargs)
    _check_lengths(prompts, "eval_dataset", policy, args)
    return prompts


def _load_policy(model: Any, args: PPOConfig, peft_config: Any) -> Any:
    if not isinstance(args, PPOConfig):
        raise TypeError(f"`args` is a {type(args).__name__}; pass a `PPOConfig`.")
    refuse_arguments(args)
    if isinstance(model, str):
        model = load_pretrained(AutoModelForCausalLM, model, dtype="float32")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; pass a name, a path or a model.")
    if peft_config is not None:
        from peft import get_peft_model  # noqa: PLC0415 - an optional extra

        if hasattr(model, "peft_config"):
            raise ValueError("The model has an adapter already and `peft_config` asks for another. Remove one.")
        refuse_base(model)
        model = get_peft_model(model, peft_config)
    refuse_adapters(model, takes_reference=True)
    refuse_policy(args, model)
    keep_differentiable(model)
    if args.kl_coef > 0:
        require_adapter_parameters(model)
    return model


def _load_tokenizer(tokenizer: Any, policy: Any, args: PPOConfig) -> Any:
    tokenizer = load_tokenizer(tokenizer, policy)
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


def _check_lengths(prompts: Dataset, name: str, policy: Any, args: PPOConfig) -> None:
    check_lengths(
        prompts, name=name, completion_length=args.max_completion_length, context=context_length(policy.config)
    )
