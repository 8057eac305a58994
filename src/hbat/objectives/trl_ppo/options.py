"""Options and tokenizers with which TRL's PPOTrainer does something else than they say."""

import os
from typing import Any


def require_options(args: Any) -> None:
    """Refuse options that TRL's PPOTrainer leaves aside without a word.

    Args:
        args: TRL's configuration.

    Raises:
        ValueError: If there is one.
    """
    own = "or use `ppo_backend: hbat`."
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`gradient_accumulation_steps` is {args.gradient_accumulation_steps}, with which TRL's PPOTrainer takes "
            f"another number of optimizer steps than it should. Set it to 1 (a step is already a rollout), {own}"
        )
    for key in ("bf16", "fp16"):
        if getattr(args, key):
            raise ValueError(
                f"`{key}` is true, but TRL's PPOTrainer computes in the weights' precision. Set it to false, {own}"
            )
    for key in ("save_strategy", "eval_strategy"):
        value = getattr(args, key)
        if str(getattr(value, "value", value)) != "no":
            raise ValueError(
                f"`{key}` is {getattr(value, 'value', value)!r}, but TRL's PPOTrainer neither evaluates inside a "
                f"stage nor goes on from a checkpoint. Set it to 'no', {own}"
            )
    if args.max_steps > 0 and args.total_episodes is not None:
        raise ValueError("Both `max_steps` and `total_episodes` are set. Leave one out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"TRL's PPOTrainer is only supported in one process. Start one, {own}")


def require_padding(tokenizer: Any) -> None:
    """Refuse to pad with the end token.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: If it does.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"The tokenizer pads with {tokenizer.pad_token!r}, its end token. TRL's PPOTrainer takes every such token "
            "for padding, also within a conversation. Give the tokenizer a `pad_token` of its own, or use "
            "`ppo_backend: hbat`."
        )
