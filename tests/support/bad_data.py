"""Writes docs/bad-data.md, every kind of fault of a row with its message: `python tests/support/bad_data.py`."""

import functools
from pathlib import Path

import cases
from cases import strict_tokenizer
from datasets import Dataset

from hbat.data.check import check_dataset
from hbat.data.formats import kto_faults, preference_faults, prompt_faults, sft_faults
from hbat.data.load import DatasetError
from hbat.data.template import row_fit

FILE = Path(__file__).resolve().parents[2] / "docs" / "bad-data.md"
CHECKS = {"sft": sft_faults, "dpo": preference_faults, "kto": kto_faults, "ppo": prompt_faults}


def user(text="Why is the sky blue?"):
    return {"role": "user", "content": text}


def assistant(text="It scatters blue light."):
    return {"role": "assistant", "content": text}


def dialogue(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[at % 2]}: {text}" for at, text in enumerate(texts))


SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
JUDGED = {"prompt": "Why?", "completion": " So.", "label": True}

#: Kinds of the public rows in the sample data, `source: kind`, by the kind that they get here.
MET = {
    "repeated role": {
        "hh_helpful: reply has the same role as its parent", "hh_harmless: chosen: two turns of one role in a row",
        "hh_harmless: rejected: two turns of one role in a row",
    },
    "role marker": {
        "hh_helpful: role marker inside a message", "hh_harmless: chosen: role marker inside a turn",
        "hh_harmless: rejected: role marker inside a turn",
    },
    "empty turn": {"hh_helpful: empty message text", "hh_harmless: chosen: final assistant turn empty"},
    "empty text": {"pandalm: a response is empty"},
    "not text": {"pandalm: a text field is not a string"},
    "prompts differ": {"hh_harmless: prompts of chosen and rejected differ"},
    "reversed pair": {"ukpconvarg: reverse of another pair"},
    "nearly identical pair": {"llmbar: chosen and rejected differ only in letter case or white space"},
}  # fmt: skip

#: A kind, an objective, and rows of which the last has a fault of that kind.
CASES = [
    ("missing column", "sft", [{"story": "Once upon a time"}]),
    ("missing column", "sft", [{"prompt": "Why?", "answer": " So."}]),
    ("missing column", "dpo", [{"prompt": "Why?", "chosen": " So."}]),
    ("missing column", "kto", [{"prompt": "Why?", "completion": " So.", "rating": True}]),
    ("missing column", "ppo", [{"messages": [user()]}]),
    ("missing value", "dpo", [PAIR, PAIR | {"rejected": None}]),
    ("not text", "dpo", [PAIR | {"rejected": True}]),
    ("empty text", "dpo", [PAIR, PAIR | {"chosen": ""}]),
    ("empty conversation", "sft", [{"messages": [user(), assistant()]}, {"messages": []}]),
    ("mixed formats", "dpo", [{"prompt": "Why?", "chosen": [assistant("So.")], "rejected": [assistant("No.")]}]),
    ("mixed formats", "sft", [{"prompt": "Why?", "completion": " So.", "messages": [user(), assistant()]}]),
    ("not a message", "sft", [{"messages": ["Why?", "So."]}]),
    ("message without role", "sft", [{"messages": [{"from": "user", "value": "Why?"}]}]),
    ("message without content", "sft", [{"messages": [user(None), assistant()]}]),
    ("unknown role", "sft", [{"messages": [{"role": "human", "content": "Why?"}, assistant()]}]),
    ("empty turn", "sft", [{"messages": [user(), assistant(" ")]}]),
    ("empty turn", "dpo", [{"chosen": dialogue("Why?", ""), "rejected": dialogue("Why?", "No.")}]),
    ("repeated role", "sft", [{"messages": [user(), user("Well?"), assistant()]}]),
    ("role marker", "sft", [{"messages": [user(), assistant("So.  Human: And red?")]}]),
    ("wrong first turn", "sft", [{"prompt": [user()], "completion": [user("Well?"), assistant()]}]),
    ("wrong last turn", "sft", [{"messages": [user(), assistant(), user("And red?")]}]),
    ("wrong last turn", "ppo", [{"prompt": [user(), assistant()]}]),
    ("no prompt", "dpo", [{"chosen": "So.", "rejected": "No."}]),
    ("prompts differ", "dpo", [{"chosen": [user(), assistant()], "rejected": [user("Well?"), assistant("No.")]}]),
    ("identical pair", "dpo", [PAIR | {"rejected": PAIR["chosen"]}]),
    ("nearly identical pair", "dpo", [PAIR | {"rejected": " so."}]),
    ("reversed pair", "dpo", [PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}]),
    ("not a label", "kto", [JUDGED | {"label": 1}]),
    ("bad token ids", "sft", [{"input_ids": [1, 2], "labels": [1]}]),
    ("unknown token", "sft", [{"input_ids": [1, 5000]}]),
    ("reserved column", "sft", [{"text": "So.", "labels": "good"}]),
    ("reserved column", "dpo", [PAIR | {"ref_chosen_logps": -3.5}]),
    ("reserved column", "kto", [PAIR | {"label": True}]),
    ("bad tools", "sft", [{"messages": [user(), assistant()], "tools": "look"}]),
    ("bad template arguments", "sft", [{"messages": [user(), assistant()], "chat_template_kwargs": None}]),
    ("template", "sft", [{"messages": [SYSTEM, user(), assistant()]}]),
]  # fmt: skip

HEAD = """# Rows that are refused

Before the first stage every row of every data set is checked, by its objective's format and then against model and
tokenizer. The first faulty row is named with its field, all are counted by kind. With `on_bad_rows: drop` such rows
are left out instead, counted by kind in a warning; a missing column stays an error. Nothing is written before that.

This table is made by `python tests/support/bad_data.py`. "Met" are the kinds found among public preference and
instruction data (HH-RLHF, PandaLM, LLMBar, UKPConvArg).

| kind | met | objective | message |
|---|---|---|---|
"""
TAIL = """
The last message is of a tokenizer whose template knows no system turn.

## What is not a fault

* The same row or pair twice.
* A cycle of preferences (a over b, b over c, c over a); only a pair against its own reverse is found.
* A text longer than `max_length`: TRL cuts it. A row of which nothing is left to learn is left out by newer TRL;
  the run counts such rows in a warning, and a stage of which no row is left is an error.
* A tie: a pair must have a better side, so leave ties out.

## Files

A file that cannot be read is named with its problem: missing (with the nearest name), empty, cut off, not JSON (with
line and column), a line or an element that is no object, nested too deeply, not UTF-8, rows without columns, columns
whose types differ between files. A data set with the column `image` or `images` is refused where the model has a
tokenizer and no processor.
"""


def message(objective, rows):
    """What a run of this objective says to rows, first by their format, then by a strict tokenizer."""
    check = CHECKS[objective]
    fit = row_fit(functools.partial(check), strict_tokenizer(), cases.VOCABULARY_SIZE)
    data = Dataset.from_list(rows)
    for faults in (check, fit):
        try:
            check_dataset(data, name=f"train_dataset[{objective!r}]", faults=faults)
        except DatasetError as error:
            return str(error)
    return None


def kinds(objective, rows):
    """The kinds of fault that the last row shows alone."""
    found = list(CHECKS[objective](rows[-1]))
    fit = row_fit(CHECKS[objective], strict_tokenizer(), cases.VOCABULARY_SIZE)
    return {each.kind for each in found or fit(rows[-1])}


def document():
    lines = []
    for kind, objective, rows in CASES:
        # What follows is the same in every message: the counts, and what to do.
        text = message(objective, rows).partition(" Faulty rows: ")[0].replace("|", "\\|")
        lines.append(f"| {kind} | {'yes' if kind in MET else ''} | `{objective}` | {text} |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
