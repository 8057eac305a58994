"""Strategies for rows of every format: good ones, ones with a named fault, and ones with anything anywhere."""

import json

from hypothesis import strategies as st

from hbat.data.formats import kto_faults, preference_faults, prompt_faults, sft_faults

WORDS = st.text("abc ü?é中", min_size=1, max_size=8).filter(str.strip)
CHECKS = {"sft": sft_faults, "dpo": preference_faults, "kto": kto_faults, "ppo": prompt_faults, "grpo": prompt_faults}


def _turn(role, words):
    return words.map(lambda text: {"role": role, "content": text})


PROMPT = st.tuples(_turn("user", WORDS)).map(list)
ANSWER = st.tuples(_turn("assistant", WORDS)).map(list)
#: A conversation of alternating turns.
DIALOGUE = st.lists(st.tuples(PROMPT, ANSWER), min_size=1, max_size=2).map(
    lambda it: [t for p, a in it for t in p + a]
)
#: The two sides of a pair differ in more than letter case and whitespace.
SIDES = st.tuples(WORDS, WORDS).map(lambda it: (f"x{it[0]}", f"y{it[1]}"))


def _said(text):
    return [{"role": "assistant", "content": text}]


def _renamed(turns):
    return [{"from": turn["role"], "value": turn["content"]} for turn in turns]


_PAIRS = {
    "pair of texts": st.builds(lambda p, it: {"prompt": p, "chosen": it[0], "rejected": it[1]}, WORDS, SIDES),
    "pair of answers": st.builds(
        lambda p, it: {"prompt": p, "chosen": _said(it[0]), "rejected": _said(it[1])}, PROMPT, SIDES
    ),
}
_TEXT, _TURNS = st.fixed_dictionaries({"prompt": WORDS}), st.fixed_dictionaries({"prompt": PROMPT})
#: Good rows by objective and format.
GOOD = {
    "sft": {
        "text": st.fixed_dictionaries({"text": WORDS}),
        "prompt and completion": st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
        "prompt and completion of messages": st.fixed_dictionaries({"prompt": PROMPT, "completion": ANSWER}),
        "messages": st.fixed_dictionaries({"messages": DIALOGUE}),
        "conversations": st.fixed_dictionaries({"conversations": DIALOGUE.map(_renamed)}),
        "tokens": st.lists(st.integers(0, 200), min_size=2, max_size=5).map(lambda ids: {"input_ids": ids}),
    },
    "dpo": _PAIRS
    | {
        "whole texts": st.builds(lambda p, it: {"chosen": p + it[0], "rejected": p + it[1]}, WORDS, SIDES),
        "whole conversations": st.builds(
            lambda p, it: {"chosen": p + _said(it[0]), "rejected": p + _said(it[1])}, PROMPT, SIDES
        ),
    },
    "kto": _PAIRS
    | {
        "judged text": st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS, "label": st.booleans()}),
        "judged answer": st.fixed_dictionaries({"prompt": PROMPT, "completion": ANSWER, "label": st.booleans()}),
    },
    "ppo": {"text": _TEXT, "messages": _TURNS},
    "grpo": {"text": _TEXT, "messages": _TURNS},
}
FORMATS = [(objective, form) for objective, forms in GOOD.items() for form in forms]


def _apart(row):
    return json.loads(json.dumps(row))  # the sides of a pair share their first turns


# --- named faults ----------------------------------------------------------------------------------------------------


def _without_role(turn):
    del turn["role"]


def _of_texts(turns):
    turns[:] = ["Hi"] * len(turns)


#: What spoils a text, with the kinds that may be named.
TEXT_SPOILS = {
    "nothing": (None, {"missing value"}),
    "no text": ("", {"empty text"}),
    "white space": (" \n\t", {"empty text"}),
    "a number": (3, {"not text"}),
    "truth": (True, {"not text"}),
}
#: What spoils a message.
TURN_SPOILS = {
    "no content": (lambda turn: turn.update(content=None), {"message without content"}),
    "empty content": (lambda turn: turn.update(content=" "), {"empty turn"}),
    "content that is no text": (lambda turn: turn.update(content=True), {"not text"}),
    "no role": (_without_role, {"message without role"}),
    "a foreign role": (lambda turn: turn.update(role="human"), {"unknown role"}),
    "a marker": (lambda turn: turn.update(content="Assistant: yes"), {"role marker"}),
}
#: What spoils a list of messages.
LIST_SPOILS = {
    "no messages": (lambda turns: turns.clear(), {"empty conversation"}),
    "texts": (_of_texts, {"not a message"}),
    "the last one twice": (lambda turns: turns.append(dict(turns[-1])), {"repeated role"}),
}


@st.composite
def spoiled(draw, objective, form):
    """A row with one named fault: the row, the field, and the kinds of which one must be named."""
    row = _apart(draw(GOOD[objective][form]))
    if form == "tokens":
        row["input_ids"][draw(st.integers(0, len(row["input_ids"]) - 1))] = draw(st.sampled_from([-1, None]))
        return row, "input_ids", {"bad token ids"}
    field = draw(st.sampled_from([name for name in row if name != "label"]))
    if isinstance(row[field], str):
        row[field], kinds = TEXT_SPOILS[draw(st.sampled_from(sorted(TEXT_SPOILS)))]
        return row, field, kinds
    if form == "conversations" or draw(st.booleans()):
        change, kinds = LIST_SPOILS[draw(st.sampled_from(sorted(LIST_SPOILS)))]
        change(row[field])
    else:
        change, kinds = TURN_SPOILS[draw(st.sampled_from(sorted(TURN_SPOILS)))]
        change(draw(st.sampled_from(row[field])))
    return row, field, kinds


# --- anything --------------------------------------------------------------------------------------------------------

#: Columns that hold data, that TRL reserves, and that mean nothing.
COLUMNS = (
    "text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "labels", "input_ids",
    "completion_mask", "assistant_masks", "attention_mask", "seq_lengths", "tools", "chat_template_kwargs", "images",
    "ref_chosen_logps", "ref_logps", "answer",
)  # fmt: skip
_LEAVES = st.sampled_from([
    None,
    "",
    " ",
    "a",
    3,
    -1,
    10**6,
    True,
    2.5,
    float("nan"),
    "</s>",
    "\x00",
    "Human: x\n\nAssistant: y",
    "Human:",
])
_TURN = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "x", None]), "content": _LEAVES}
)
ANYTHING = st.one_of(
    _LEAVES, st.lists(_LEAVES, max_size=2), st.lists(_TURN, max_size=2), st.lists(st.just([]), max_size=1)
)


def _paths(value, path=()):
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _paths(value[key], (*path, key))


@st.composite
def disturbed(draw, objective):
    """A good row in which one or two values, anywhere, were replaced, removed or added."""
    row = _apart(draw(st.one_of(*GOOD[objective].values())))
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        paths = list(_paths(row))
        if how == "add" or not paths:
            row[draw(st.sampled_from(COLUMNS))] = draw(ANYTHING)
            continue
        *above, last = draw(st.sampled_from(paths))
        place = row
        for key in above:
            place = place[key]
        if how == "remove":
            del place[last]
        else:
            place[last] = draw(ANYTHING)
    return _apart(row)
