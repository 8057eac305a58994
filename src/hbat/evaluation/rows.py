"""Held-out rows: prompts with their references, preference pairs, plain texts."""

import gzip
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from trl.data_utils import extract_prompt

from hbat.config.evaluation import OnBadRows
from hbat.data.check import check_dataset
from hbat.data.faults import MISSING_COLUMN, Fault, RowCheck
from hbat.data.formats import preference_faults, prompt_faults, sft_faults, shared_beginning
from hbat.data.load import DatasetError
from hbat.data.sources import Rows, load_rows
from hbat.data.turns import answer_start


class Asked(NamedTuple):
    """A prompt, what the chat template takes beside it, and the answer that its row has."""

    prompt: Any
    options: Mapping[str, Any]
    reference: str | None = None


def asked(row: Mapping[str, Any]) -> Asked:
    """Take the prompt of a row in one of TRL's formats, a text or messages; None for a text without one."""
    tools = row.get("tools")
    if isinstance(tools, str):  # as TRL takes them too
        tools = json.loads(tools)
    options = {**(row.get("chat_template_kwargs") or {}), **({"tools": tools} if tools else {})}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt"):
        answer = (
            row.get("completion", row.get("reference", chosen)) if row.get("label") is not False else None
        )  # of KTO: not wanted
        return Asked(row["prompt"], options, _text(answer))
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = shared_beginning(chosen, rejected)
        return Asked(chosen[:start], options, _text(chosen[start:]))
    turns = row.get("messages") or chosen
    if not isinstance(turns, list) or not turns:
        return Asked(None, options)
    start = answer_start(turns)
    return Asked(turns[:start], options, _text(turns[start:]))


def _text(answer: Any) -> str | None:
    if isinstance(answer, str | None):
        return answer
    own = [turn for turn in answer if turn.get("role", "assistant") == "assistant"]  # no results of tools
    return "\n".join(str(turn["content"]) for turn in own if turn.get("content")) or None


def load_asked(source: Any, limit: int | None, on_bad_rows: OnBadRows = "raise") -> list[Asked]:
    """Load prompts with their references.

    Args:
        source: Rows as `hbat.data.sources.load_rows` takes them: with prompts alone, for SFT, or preferences.
        limit: Number of rows that are taken; None for all.
        on_bad_rows: What to do with rows without a prompt, or with a faulty one.

    Raises:
        DatasetError: If they cannot be read, or a row is faulty.
    """
    name = "`prompts`"
    rows, _ = load_rows(source, name=name, check=_kind(source, name))
    return [asked(row) for row in _kept(rows, name, _ask_faults, limit, on_bad_rows)]


def _kind(source: Any, name: str) -> RowCheck:
    """The check of what they are: preferences, demonstrations, or prompts alone."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.INFO))  # which layout it would be
    try:
        for check in (preference_faults, sft_faults):
            with suppress(DatasetError):  # in no layout of this kind, or it cannot be read, which is said later
                dataset = load_rows(source, name=name, check=check)[0].dataset
                if all(fault.kind != MISSING_COLUMN for fault in check(dataset[0] if len(dataset) else {})):
                    return check
    finally:
        logging.disable(disabled)
    return prompt_faults


def _ask_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    prompt = asked(row).prompt
    if prompt:
        yield from prompt_faults({"prompt": prompt})
    else:
        yield Fault("no prompt", "prompt", "it has no prompt")


def _kept(rows: Rows, name: str, check: RowCheck, limit: int | None, on_bad_rows: OnBadRows) -> Dataset:
    taken = rows if limit is None else rows.select(range(min(limit, len(rows.dataset))))
    return check_dataset(taken.dataset, name=name, faults=check, on_bad_rows=on_bad_rows, origin=taken.origin)[0]


def load_pairs(source: Any, limit: int | None, on_bad_rows: OnBadRows = "raise") -> list[dict[str, Any]]:
    """Load preference pairs, each with its prompt. Arguments and errors as in `load_asked`."""
    rows, _ = load_rows(source, name="`pairs`", check=preference_faults)
    kept = _kept(rows, "`pairs`", preference_faults, limit, on_bad_rows)
    return [dict(row) if row.get("prompt") else {**row, **extract_prompt(row)} for row in kept]


def load_texts(source: Any, limit: int | None) -> list[str]:
    """Load plain texts: a file with one in every line that is not empty, or rows with a `text`.

    Raises:
        DatasetError: If they cannot be read, or there are none.
    """
    if isinstance(source, str | Path) and str(source).endswith((".txt", ".txt.gz")):
        try:
            texts = [line.strip() for line in _lines(Path(source)) if line.strip()]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DatasetError(f"`texts` {str(source)!r} cannot be read: {error}") from error
    else:
        dataset = load_rows(source, name="`texts`", check=None)[0].dataset
        if "text" not in dataset.column_names:
            raise DatasetError(f"`texts` has the columns {dataset.column_names}; it needs `text`.")
        texts = [text for text in dataset["text"] if isinstance(text, str) and text.strip()]
    if not texts:
        raise DatasetError("`texts` has no texts.")
    return texts[:limit]


def _lines(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        yield from lines
