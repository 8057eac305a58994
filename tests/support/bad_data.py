"""Writes docs/bad-data.md, every kind of fault of a row with its message: `python tests/support/bad_data.py`."""

import functools
from pathlib import Path

import cases
from cases import strict_tokenizer
from datasets import Dataset
from messages import SYSTEM, assistant, dialogue, user

from hbat.data.check import check_dataset
from hbat.data.formats import kto_faults, preference_faults, prompt_faults, sft_faults
from hbat.data.load import DatasetError
from hbat.data.sources import load_rows
from hbat.data.template import Limits, row_fit

FILE = Path(__file__).resolve().parents[2] / "docs" / "bad-data.md"
CHECKS = {"sft": sft_faults, "dpo": preference_faults, "kto": kto_faults, "ppo": prompt_faults}


PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
JUDGED = {"prompt": "Why?", "completion": " So.", "label": True}

SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]

#: Of a model, for prompts of PPO.
WHY = "with `max_completion_length` 8 the model's context of 128 leaves room for 120"
LIMITS = Limits(cases.VOCABULARY_SIZE, 120, WHY)

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
    ("missing column", "sft", [{"prompt": "Why?", "reply": " So."}]),
    ("missing column", "dpo", [{"prompt": "Why?", "chosen": " So."}]),
    ("missing column", "kto", [{"prompt": "Why?", "completion": " So.", "rating": True}]),
    ("missing column", "ppo", [{"text": "Why?"}]),
    ("missing value", "dpo", [PAIR, PAIR | {"rejected": None}]),
    ("not text", "dpo", [PAIR | {"rejected": True}]),
    ("empty text", "dpo", [PAIR, PAIR | {"chosen": ""}]),
    ("empty conversation", "sft", [{"messages": [user(), assistant()]}, {"messages": []}]),
    ("mixed formats", "dpo", [{"prompt": [user()], "chosen": "So.", "rejected": "No."}]),
    ("mixed formats", "sft", [{"prompt": "Why?", "completion": " So.", "messages": [user(), assistant()]}]),
    ("not a message", "sft", [{"messages": ["Why?", "So."]}]),
    ("message without role", "sft", [{"messages": [{"role": None, "content": "Why?"}, assistant()]}]),
    ("message without content", "sft", [{"messages": [user(None), assistant()]}]),
    ("unknown role", "sft", [{"messages": [{"role": "usr", "content": "Why?"}, assistant()]}]),
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
    ("not a label", "kto", [JUDGED | {"label": 2}]),
    ("bad token ids", "sft", [{"input_ids": [1, 2], "labels": [1]}]),
    ("unknown token", "sft", [{"input_ids": [1, 5000]}]),
    ("too long", "ppo", [{"prompt": "Why? " * 30}]),
    ("reserved column", "sft", [{"text": "So.", "labels": "good"}]),
    ("reserved column", "dpo", [PAIR | {"ref_chosen_logps": -3.5}]),
    ("reserved column", "kto", [PAIR | {"label": True}]),
    ("bad tools", "sft", [{"messages": [user(), assistant()], "tools": "look"}]),
    ("bad template arguments", "sft", [{"messages": [user(), assistant()], "chat_template_kwargs": None}]),
    ("missing value", "sft", [{"instruction": "Why?", "output": text} for text in ("So.", None)]),
    ("wrong last turn", "sft", [{"conversations": SHAREGPT}, {"conversations": SHAREGPT[:1]}]),
    ("unreadable", "sft", [{"conversations": SHAREGPT}, {"conversations": [SHAREGPT[0], None]}]),
    ("template", "sft", [{"messages": [SYSTEM, user(), assistant()]}]),
]  # fmt: skip

HEAD = """# Faulty rows

Before the first stage, every row of every data set is checked: first against the format of its objective, then against
the model and its tokenizer. The error names the first faulty row and field of every data set and counts all by kind.
With `on_bad_rows: drop`, faulty rows are dropped with a warning that counts them; a missing column is always an error.
Nothing is written to disk before these checks.

`python tests/support/bad_data.py` writes this page. "Met" marks kinds found in public preference and instruction data
(HH-RLHF, PandaLM, LLMBar, UKPConvArg).

| kind | met | objective | message |
|---|---|---|---|
"""
TAIL = """
The last message comes from a tokenizer whose chat template accepts no system message.

## What is not a fault

* Duplicate rows or pairs.
* A cycle of preferences (a over b, b over c, c over a). Only a pair and its own reverse are found.
* A text longer than `max_length`: TRL truncates it. Newer versions of TRL drop a row of which nothing is left to
  learn; the run counts such rows in a warning, and a stage without any rows left is an error.
* Ties cannot be expressed: a pair needs a better side, so remove them.

## Files

The error for a file that cannot be read names its problem: missing (with the nearest name), empty, truncated, not JSON
(with line and column), a line or an element that is not an object, nested too deeply, not UTF-8, rows without columns,
or columns whose types differ between files. A data set with a column `image` or `images` is refused if the model has a
tokenizer and no processor.
"""


def message(objective, rows):
    """The error of a run of this objective about rows: their format first, then a strict tokenizer."""
    check = CHECKS[objective]
    fit = row_fit(functools.partial(check), strict_tokenizer(), LIMITS)
    name = f"train_dataset[{objective!r}]"
    loaded, _ = load_rows(Dataset.from_list(rows), name=name, check=check)
    for faults in (check, fit):
        try:
            check_dataset(loaded.dataset, name=name, faults=faults, origin=loaded.origin)
        except DatasetError as error:
            return str(error)
    return None


def kinds(objective, rows):
    """The kinds of fault that the last row shows alone."""
    loaded, _ = load_rows(Dataset.from_list(rows), name="data", check=CHECKS[objective])
    last = loaded.dataset[-1]
    found = list(CHECKS[objective](last)) or row_fit(CHECKS[objective], strict_tokenizer(), LIMITS)(last)
    return {loaded.origin.worded(len(rows) - 1, fault).kind for fault in found}


def document():
    lines = []
    for kind, objective, rows in CASES:
        # The rest is the same in every message: the counts and the advice.
        text = message(objective, rows).partition(" Faulty rows: ")[0].replace("|", "\\|")
        lines.append(f"| {kind} | {'yes' if kind in MET else ''} | `{objective}` | {text} |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
