"""What PPO needs of model, tokenizer, rows and machine, checked when the trainer is built."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from hbat.engines.checks import refuse_arguments, refuse_model, refuse_trainer
from hbat.engines.deepspeed.request import is_asked
from hbat.engines.refusals import REFUSALS
from hbat.model.adapters import refuse_adapters
from hbat.model.load import load_pretrained, load_tokenizer
from hbat.ppo.config import PPOConfig
from hbat.ppo.rollouts.prompts import TOKENS, check_lengths, context_length, tokenise


def prepare(
    model: Any, args: PPOConfig, train_dataset: Dataset, processing_class: Any, peft_config: Any
) -> tuple[Any, Any, Dataset]:
    """Load what is given by name, and check that everything fits together.

    Args:
        model: A name, a path, or a model.
        args: The options.
        train_dataset: Rows with `prompt`.
        processing_class: The tokenizer; the model's own where left out.
        peft_config: Configuration of a new adapter.

    Returns:
        The policy with its adapter where there is one, its tokenizer, and the rows with their tokens.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If model, tokenizer, rows and options do not fit each other.
    """
    policy = load_policy(model, args, peft_config)
    tokenizer = require_tokenizer(processing_class, policy, args)
    require_vocabulary(policy, tokenizer)
    prompts = tokenise(train_dataset, tokenizer, args.chat_template_kwargs)
    require_rows(prompts, "train_dataset", policy, args)
    return policy, tokenizer, prompts


def prepare_rows(rows: Any, policy: Any, tokenizer: Any, args: PPOConfig) -> Any:
    """Tokenise prompts to evaluate on and check them, unless that has been done.

    Args:
        rows: A data set, several by name, or None.
        policy: The policy.
        tokenizer: Its tokenizer.
        args: The options.

    Returns:
        The same with the tokens.

    Raises:
        ValueError: If a prompt does not fit.
    """
    if isinstance(rows, Mapping):
        return {name: prepare_rows(each, policy, tokenizer, args) for name, each in rows.items()}
    if rows is None or TOKENS in rows.column_names:
        return rows
    prompts = tokenise(rows, tokenizer, args.chat_template_kwargs)
    require_lengths(prompts, "eval_dataset", policy, args)
    return prompts


def load_policy(model: Any, args: PPOConfig, peft_config: Any) -> Any:
    """Bring the policy into the form that is trained.

    Args:
        model: A name, a path, or a model.
        args: The options.
        peft_config: Configuration of a new adapter.

    Returns:
        The policy, with its adapter where there is one.

    Raises:
        TypeError: If `args` or `model` is of the wrong kind.
        ValueError: If the machine or the adapter cannot be used.
        NotImplementedError: Under an engine that is not supported.
    """
    if not isinstance(args, PPOConfig):
        raise TypeError(f"`args` is a {type(args).__name__}; give a `PPOConfig`.")
    refuse_arguments(args)
    if is_asked(args):
        raise REFUSALS["PPOTrainer under DeepSpeed"].error()
    if isinstance(model, str):
        model = load_pretrained(AutoModelForCausalLM, model, dtype="float32")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a name, a path or a model.")
    if peft_config is not None:
        from peft import get_peft_model  # noqa: PLC0415 - an optional extra

        if hasattr(model, "peft_config"):
            raise ValueError("The model has an adapter already and `peft_config` asks for another. Leave one out.")
        refuse_model(model, gets_adapter=True)
        model = get_peft_model(model, peft_config)
    refuse_adapters(model, takes_reference=True)
    refuse_trainer(args, model)
    return model


def require_tokenizer(tokenizer: Any, policy: Any, args: PPOConfig) -> Any:
    """Take the given tokenizer or the policy's own, and check that completions can end.

    Args:
        tokenizer: The given one, or None.
        policy: The policy.
        args: The options.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        ValueError: If it lacks an end token that nothing replaces.
    """
    tokenizer = load_tokenizer(tokenizer, policy)
    replaced = {"eos_token_id", "stop_strings"} & (args.generation_kwargs or {}).keys()
    if tokenizer.eos_token_id is None and not replaced:
        raise ValueError(
            "The tokenizer has no end token, so no completion would ever end by itself. Set its `eos_token`, or "
            "`generation_kwargs` with `eos_token_id` or `stop_strings`."
        )
    return tokenizer


def require_vocabulary(policy: Any, tokenizer: Any) -> None:
    """Check that policy and tokenizer fit.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer has tokens that the policy does not know.
    """
    embeddings = policy.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the policy only {rows} embeddings. Give the tokenizer "
            "that belongs to the model, or resize its embeddings."
        )


def require_rows(prompts: Dataset, name: str, policy: Any, args: PPOConfig) -> None:
    """Check that there are enough prompts and that each fits the policy.

    Args:
        prompts: Tokenised rows.
        name: How to call the data set in messages.
        policy: The policy.
        args: The options.

    Raises:
        ValueError: If not.
    """
    needed = args.rollout_size * args.world_size
    if len(prompts) < needed:
        processes = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ValueError(
            f"{name} has {len(prompts)} rows, but a rollout takes {args.rollout_size} prompts{processes}. Lower "
            "`rollout_batch_size` (or `per_device_train_batch_size` and `gradient_accumulation_steps`), or give more."
        )
    require_lengths(prompts, name, policy, args)


def require_lengths(prompts: Dataset, name: str, policy: Any, args: PPOConfig) -> None:
    """Check that each prompt leaves room for a completion.

    Args:
        prompts: Tokenised rows.
        name: How to call the data set in messages.
        policy: The policy.
        args: The options.

    Raises:
        ValueError: If not.
    """
    check_lengths(
        prompts, name=name, completion_length=args.max_completion_length, context=context_length(policy.config)
    )
