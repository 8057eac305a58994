"""The run's chat template, set before anything is made of model or tokenizer."""

import warnings
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import clone_chat_template

_JINJA = (".jinja", ".j2", ".jinja2")


def set_chat_template(template: str | None, model: Any, tokenizer: Any, *, gets_adapter: bool, seed: int) -> None:
    """Give the tokenizer a chat template; with another tokenizer's, also its special tokens and end token.

    Args:
        template: A Jinja file, the template itself, or the name or folder of a tokenizer; None changes nothing.
        model: The model, without the adapter that it gets. Its embeddings are resized for new tokens.
        tokenizer: The tokenizer, or a processor.
        gets_adapter: Whether an adapter will be trained instead of the model.
        seed: Random seed of the new embeddings.

    Raises:
        ValueError: If the template cannot be read, or the model has an adapter whose embeddings cannot be resized.
    """
    if template is None:
        return
    if "{" in template:
        tokenizer.chat_template = template
    elif template.endswith(_JINJA):
        if not Path(template).is_file():
            raise ValueError(f"`chat_template` is {template!r}, but there is no file {Path(template).absolute()}.")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    else:
        set_seed(seed)  # under an adapter a resumed run has to make the same ones
        added = _clone(template, model, getattr(tokenizer, "tokenizer", tokenizer))
        tokenizer.chat_template = getattr(tokenizer, "tokenizer", tokenizer).chat_template
        if added and gets_adapter:
            warnings.warn(
                f"`chat_template` adds {len(added)} tokens, first {added[0]!r}, whose embeddings are new and "
                "which an adapter does not train. Add the embeddings and the head to `modules_to_save`, or give a "
                "template of tokens that the model knows.",
                stacklevel=3,
            )


def _clone(source: str, model: Any, tokenizer: Any) -> list[str]:
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"`chat_template` is the tokenizer {source!r}, whose tokens would resize the embeddings under an adapter "
            "that exists already. Give its template as a Jinja file, or merge the adapter first (`hbat merge`)."
        )
    known = len(tokenizer)
    try:
        # Rounded up to nothing: tokens that no text has would only be trained and saved.
        clone_chat_template(model, tokenizer, source, resize_to_multiple_of=None)
    except (OSError, ValueError) as error:
        raise ValueError(f"`chat_template` is {source!r}, but it cannot be read from a tokenizer: {error}") from error
    added: list[str] = tokenizer.convert_ids_to_tokens(range(known, len(tokenizer)))
    return added
