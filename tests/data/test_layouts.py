"""Rows in layouts that are not TRL's become rows that are, and their faults are named in their own words."""

import json

import cases
import pytest
import runs
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.config.hbat import HBATConfig
from hbat.data.check import check_dataset
from hbat.data.formats import kto_faults, preference_faults, prompt_faults, sft_faults
from hbat.data.load import DatasetError
from hbat.data.sources import load_rows
from hbat.trainer import HBATTrainer

CHECKS = {"sft": sft_faults, "dpo": preference_faults, "kto": kto_faults, "ppo": prompt_faults}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def part(text):
    return {"type": "text", "value": text}


ASK, GOOD, BAD = "How are you?", "Fine.", "Who asks?"
DIALOGUE = [human(ASK), gpt(GOOD), human("And you?"), gpt("Well.")]
AS_MESSAGES = [user(ASK), answer(GOOD), user("And you?"), answer("Well.")]
PAIR = {"prompt": [user(ASK)], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]}
WHOLE = {"chosen": [user(ASK), answer(GOOD)], "rejected": [user(ASK), answer(BAD)]}
SAID = {"prompt": [user(ASK)], "completion": [answer(GOOD)]}
GOOD_TRANSCRIPT = f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}"
BAD_TRANSCRIPT = f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"

#: Objective, row in a file, options, the row in TRL's format.
LAYOUTS = {
    "alpaca": ("sft", {"instruction": ASK, "input": "", "output": GOOD}, {}, SAID),
    "alpaca with input": (
        "sft", {"instruction": "Add.", "input": "2 + 2", "output": "4"}, {},
        {"prompt": [user("Add.\n2 + 2")], "completion": [answer("4")]},
    ),
    "alpaca with history and system": (
        "sft", {"instruction": "And you?", "output": "Well.", "history": [[ASK, GOOD]], "system": "Be brief."}, {},
        {"prompt": [system("Be brief."), *AS_MESSAGES[:3]], "completion": AS_MESSAGES[3:]},
    ),
    "alpaca pairs": ("dpo", {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD}, {}, PAIR),
    "alpaca kto": ("kto", {"instruction": ASK, "output": GOOD, "kto_tag": True}, {}, SAID | {"label": True}),
    "alpaca prompts": ("ppo", {"instruction": ASK, "output": GOOD}, {}, {"output": GOOD, "prompt": [user(ASK)]}),
    "sharegpt": ("sft", {"conversations": DIALOGUE}, {}, {"messages": AS_MESSAGES}),
    "sharegpt with system": (
        "sft", {"conversations": DIALOGUE, "system": "Be brief."}, {},
        {"messages": [system("Be brief."), *AS_MESSAGES]},
    ),
    "sharegpt with system turn": (
        "sft", {"conversations": [{"from": "system", "value": "Be brief."}, *DIALOGUE]}, {},
        {"messages": [system("Be brief."), *AS_MESSAGES]},
    ),
    "sharegpt with role and content": (
        "sft", {"conversations": [{"role": "human", "content": ASK}, {"role": "gpt", "content": GOOD}]}, {},
        {"messages": AS_MESSAGES[:2]},
    ),
    "sharegpt pairs": ("dpo", {"conversations": [human(ASK)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, {}, PAIR),
    "sharegpt pairs of lists": (
        "dpo", {"conversations": [human(ASK)], "chosen": [gpt(GOOD)], "rejected": [gpt(BAD)]}, {}, PAIR,
    ),
    "sharegpt pairs of texts": ("dpo", {"conversations": [human(ASK)], "chosen": GOOD, "rejected": BAD}, {}, PAIR),
    "sharegpt whole pairs": (
        "dpo", {"chosen": [human(ASK), gpt(GOOD)], "rejected": [human(ASK), gpt(BAD)]}, {}, WHOLE,
    ),
    "sharegpt kto": (
        "kto", {"conversations": DIALOGUE, "label": False}, {},
        {"prompt": AS_MESSAGES[:3], "completion": AS_MESSAGES[3:], "label": False},
    ),
    "sharegpt prompts": ("ppo", {"conversations": DIALOGUE, "level": 3}, {}, {"level": 3, "prompt": AS_MESSAGES[:3]}),
    "messages of parts": (
        "sft", {"messages": [user([part(ASK)]), answer([part("Fi"), part("ne.")])]}, {}, {"messages": AS_MESSAGES[:2]},
    ),
    "messages with other roles": (
        "sft", {"messages": [{"role": "Human", "content": ASK}, {"role": "bot", "content": GOOD}]}, {},
        {"messages": AS_MESSAGES[:2]},
    ),
    "messages kto": (
        "kto", {"messages": AS_MESSAGES, "label": 1}, {},
        {"prompt": AS_MESSAGES[:3], "completion": AS_MESSAGES[3:], "label": True},
    ),
    "messages pairs": ("dpo", {"messages": [user(ASK)], "chosen": answer(GOOD), "rejected": answer(BAD)}, {}, PAIR),
    "messages prompts": ("ppo", {"messages": AS_MESSAGES[:2]}, {}, {"prompt": [user(ASK)]}),
    "pairs as messages": (
        "dpo", {"chosen_messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]}, {}, WHOLE,
    ),
    "ultrafeedback": (
        "dpo", {"prompt": ASK, "messages": WHOLE["chosen"], "score_chosen": 9.0, **WHOLE}, {}, WHOLE,
    ),
    "question and answer": ("sft", {"question": ASK, "answer": GOOD}, {}, SAID),
    "instruction and response": ("sft", {"instruction": ASK, "response": GOOD}, {}, SAID),
    "question with ranked responses": ("dpo", {"question": ASK, "response_j": GOOD, "response_k": BAD}, {}, PAIR),
    "prompt with ranked responses": ("dpo", {"prompt": ASK, "response_j": GOOD, "response_k": BAD}, {}, PAIR),
    "instruction with context": (
        "sft", {"instruction": "Add.", "context": "2 + 2", "response": "4", "category": "sums"}, {},
        {"prompt": [user("Add.\n2 + 2")], "completion": [answer("4")]},
    ),
    "messages beside their prompt": ("sft", {"prompt": ASK, "messages": AS_MESSAGES}, {}, {"messages": AS_MESSAGES}),
    "numbers": ("sft", {"question": ASK, "answer": 3}, {}, {"prompt": [user(ASK)], "completion": [answer("3")]}),
    "sharegpt with two system messages": (
        "sft", {"conversations": [{"from": "system", "value": "Be brief."}, *DIALOGUE], "system": "Be kind."}, {},
        {"messages": [system("Be brief."), *AS_MESSAGES]},
    ),
    "question for rewards": ("ppo", {"question": ASK, "answer": "4"}, {}, {"answer": "4", "prompt": [user(ASK)]}),
    "judged text": ("kto", {"question": ASK, "answer": GOOD, "label": "rejected"}, {}, SAID | {"label": False}),
    "hh pairs": (
        "dpo", {"chosen": GOOD_TRANSCRIPT, "rejected": BAD_TRANSCRIPT}, {"layout": "hh"}, WHOLE,
    ),
    "hh text": ("sft", {"text": GOOD_TRANSCRIPT}, {"layout": "hh"}, {"messages": AS_MESSAGES[:2]}),
    "hh prompts with completions": (
        "sft", {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "completion": f" {GOOD}"}, {"layout": "hh"},
        {"prompt": [user(ASK)], "completion": [answer(GOOD)]},
    ),
    "hh kto": (
        "kto", {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "completion": f" {GOOD}", "label": True},
        {"layout": "hh"}, SAID | {"label": True},
    ),
    "hh prompts": ("ppo", {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:"}, {"layout": "hh"}, {"prompt": [user(ASK)]}),
    "columns": (
        "sft", {"q": ASK, "a": GOOD}, {"columns": {"prompt": "q", "completion": "a"}},
        {"prompt": ASK, "completion": GOOD},
    ),
    "columns of a layout": (
        "sft", {"task": ASK, "a": GOOD}, {"columns": {"instruction": "task", "output": "a"}}, SAID,
    ),
    "selected columns": (
        "sft", {"prompt": ASK, "completion": GOOD, "id": 1}, {"columns": ["prompt", "completion"]},
        {"prompt": ASK, "completion": GOOD},
    ),
    "roles": (
        "sft", {"messages": [{"role": "asker", "content": ASK}, {"role": "oracle", "content": GOOD}]},
        {"roles": {"asker": "user", "oracle": "assistant"}}, {"messages": AS_MESSAGES[:2]},
    ),
    "layout for text": ("sft", {"instruction": ASK, "output": GOOD, "text": "x"}, {"layout": "alpaca"}, SAID),
}  # fmt: skip


def converted(objective, rows, **options):
    return load_rows({"path": Dataset.from_list(rows), **options}, name="data", check=CHECKS[objective])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_layout_become_rows_of_trl(name):
    objective, row, options, expected = LAYOUTS[name]
    rows = converted(objective, [row, row], **options)
    assert rows.dataset.to_list() == [expected, expected]
    check_dataset(rows.dataset.select([0]), name="data", faults=CHECKS[objective])


TRL_ROWS = {
    "sft text": ("sft", {"text": "A text.", "instruction": ASK, "output": GOOD}),
    "sft texts": ("sft", {"prompt": ASK, "completion": GOOD}),
    "sft messages": ("sft", {"messages": AS_MESSAGES}),
    "sft tokens": ("sft", {"input_ids": [1, 2], "question": ASK, "answer": GOOD}),
    "pairs of texts": ("dpo", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}),
    "pairs of transcripts": ("dpo", {"chosen": GOOD_TRANSCRIPT, "rejected": BAD_TRANSCRIPT}),
    "pairs of messages": ("dpo", PAIR),
    "whole pairs": ("dpo", WHOLE),
    "judged": ("kto", {"prompt": ASK, "completion": GOOD, "label": True}),
    "prompts": ("ppo", {"prompt": [user(ASK)], "answer": GOOD}),
    "with parts of images": (
        "sft", {"messages": [user([{"type": "image", "text": None}, {"type": "text", "text": ASK}])]}
    ),
    "with parts of images and of text": (
        "sft",
        {"messages": [user([{"type": "image", "text": None}]), answer([part(GOOD)])], "images": ["x"]},
    ),
    "turns without roles": ("sft", {"conversation": [{"input": ASK, "output": GOOD}]}),
    "nothing known": ("sft", {"body": "A text."}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRL_ROWS)
def test_rows_of_trl_are_left_as_they_are(name):
    objective, row = TRL_ROWS[name]
    dataset = Dataset.from_list([row])
    assert load_rows(dataset, name="data", check=CHECKS[objective])[0].dataset is dataset


def test_calls_of_functions_and_their_results_become_tool_calls():
    call = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    turns = [
        human("1 + 2?"),
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "3"},
        gpt("3."),
    ]
    tools = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    row = converted("sft", [{"conversations": turns, "tools": tools}]).dataset[0]  # `to_list` of datasets 4.7: JSON
    roles = [turn["role"] for turn in row["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert row["messages"][1]["tool_calls"] == [called]
    assert row["tools"] == tools
    check_dataset(Dataset.from_list([row]), name="data", faults=sft_faults)


KINDS, CALLS = ("text", "image"), ('{"name": "f"}', "f()")
#: Objective, rows (the second one faulty), what the message says.
FAULTY = {
    "alpaca without output": (
        "sft", [{"instruction": ASK, "output": GOOD}, {"instruction": ASK, "output": None}],
        "row 1, field `output`: the value is missing.",
    ),
    "alpaca with empty output": (
        "sft", [{"instruction": ASK, "output": GOOD}, {"instruction": ASK, "output": " "}],
        "row 1, field `output`: the text is empty.",
    ),
    "alpaca without instruction": (
        "sft", [{"instruction": ASK, "output": GOOD}, {"instruction": None, "output": GOOD}],
        "row 1, field `instruction`: the value is missing.",
    ),
    "alpaca with empty history": (
        "sft", [{"instruction": ASK, "output": GOOD, "history": history} for history in ([[ASK, GOOD]], [[ASK, ""]])],
        "row 1, field `history[0][1]`: the text is empty.",
    ),
    "sharegpt that ends with the human": (
        "sft", [{"conversations": DIALOGUE}, {"conversations": DIALOGUE[:3]}],
        "row 1, field `conversations[2].from`: the last turn must be from the gpt.",
    ),
    "sharegpt with an unknown role": (
        "sft", [{"conversations": DIALOGUE}, {"conversations": [{"from": "usr", "value": ASK}, gpt(GOOD)]}],
        "assistant, tool. Did you mean `user`? `roles` maps roles, as in `roles: {narrator: assistant}`.",
    ),
    "sharegpt with an empty turn": (
        "sft", [{"conversations": DIALOGUE, "system": "S"}, {"conversations": [human(""), gpt(GOOD)], "system": "S"}],
        "row 1, field `conversations[0].value`: the content is empty.",
    ),
    "sharegpt without turns": (
        "sft", [{"conversations": DIALOGUE}, {"conversations": []}],
        "row 1, field `conversations`: the list of messages is empty.",
    ),
    "sharegpt that repeats a role": (
        "sft", [{"conversations": DIALOGUE}, {"conversations": [human(ASK), human(ASK), gpt(GOOD)]}],
        "row 1, field `conversations[1].from`: two consecutive turns have the role 'human'.",
    ),
    "pair without rejected": (
        "dpo", [{"question": ASK, "response_j": GOOD, "response_k": text} for text in (BAD, None)],
        "row 1, field `response_k`: the value is missing.",
    ),
    "equal pair": (
        "dpo", [{"conversations": [human(ASK)], "chosen": gpt(GOOD), "rejected": gpt(text)} for text in (BAD, GOOD)],
        "row 1, field `rejected`: it is identical to `chosen`.",
    ),
    "pair with an empty answer": (
        "dpo", [{"conversations": [human(ASK)], "chosen": gpt(text), "rejected": gpt(BAD)} for text in (GOOD, "")],
        "row 1, field `chosen.value`: the content is empty.",
    ),
    "pairs whose prompts differ": (
        "dpo",
        [{"chosen": [human(ASK), gpt(GOOD)], "rejected": [human(text), gpt(BAD)]} for text in (ASK, "Who?")],
        "row 1, field `rejected[0]`: turn 1 differs from that of `chosen`",
    ),
    "reversed pair": (
        "dpo", [{"question": ASK, "response_j": one, "response_k": two} for one, two in ((GOOD, BAD), (BAD, GOOD))],
        "row 1, field `response_j`: row 0 is the same pair with chosen and rejected swapped.",
    ),
    "kto that ends with the user": (
        "kto", [{"messages": AS_MESSAGES[:count], "label": True} for count in (4, 3)],
        "row 1, field `messages`: the last turn must be from the assistant.",
    ),
    "kto without a label": (
        "kto", [{"question": ASK, "answer": GOOD, "label": label} for label in ("chosen", "so-so")],
        "row 1, field `label`: 'so-so' is neither true (desirable) nor false (undesirable).",
    ),
    "a null for a turn": (
        "sft", [{"conversations": DIALOGUE}, {"conversations": [human(ASK), None]}],
        "row 1, field `conversations[1]`: None is not a message with `from` and `value`.",
    ),
    "a part that is no text": (
        "sft", [{"conversations": [human([{"type": kind, "text": ASK}]), gpt([part(GOOD)])]} for kind in KINDS],
        "row 1, field `conversations[0].value`: a part of the type 'image' cannot be converted, only text.",
    ),
    "a call that is none": (
        "sft", [{"conversations": [human(ASK), {"from": "function_call", "value": value}]} for value in CALLS],
        "row 1, field `conversations[1].value`: 'f()' is not the JSON of a function call, such as",
    ),
    "a history that is no pair": (
        "sft", [{"instruction": ASK, "output": GOOD, "history": history} for history in ([[ASK, GOOD]], [[ASK]])],
        "row 1, field `history[0]`: ['How are you?'] is not a pair of question and answer.",
    ),
    "prompts without a question": (
        "ppo", [{"question": text, "answer": "4"} for text in (ASK, "")],
        "row 1, field `question`: the text is empty.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_in_the_words_of_the_layout(name):
    objective, given, message = FAULTY[name]
    rows = converted(objective, given)
    with pytest.raises(DatasetError) as error:
        check_dataset(rows.dataset, name="data", faults=CHECKS[objective], origin=rows.origin)
    assert message in str(error.value)


words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(lambda text: text.strip())
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(conversations, st.none() | words)
def test_every_layout_of_a_conversation_becomes_the_same_messages(pairs, instruction):
    *earlier, (question, reply) = pairs
    turns = [turn for asked, replied in pairs for turn in ((human(asked), gpt(replied)))]
    messages = [turn for asked, replied in pairs for turn in (user(asked), answer(replied))]
    expected = [system(instruction), *messages] if instruction else messages
    first = [{"from": "system", "value": instruction}] if instruction else []
    parts = [{"role": turn["from"], "content": [part(turn["value"])]} for turn in [*first, *turns]]
    rows = {
        "alpaca": {"instruction": question, "output": reply, "history": [*map(list, earlier)], "system": instruction},
        "sharegpt": {"conversations": turns, "system": instruction},
        "sharegpt with a system turn": {"conversations": [*first, *turns]},
        "messages": {"messages": parts},
    }  # fmt: skip
    for name, row in rows.items():
        (made,) = converted("sft", [row]).dataset.to_list()
        assert (made["messages"] if "messages" in made else made["prompt"] + made["completion"]) == expected, name


#: Layouts whose rows can be mixed, as they become columns of one format; of the slow ones other tests train on rows.
GROUPS = [
    ("sft", ("completion", "prompt")), ("dpo", ("chosen", "rejected")),
    pytest.param("kto", ("completion", "label", "prompt"), marks=runs.needs_kto),
]  # fmt: skip
SLOW = [("sft", ("messages",)), ("dpo", ("chosen", "prompt", "rejected")), ("ppo", ("prompt",))]


def each_group(groups):
    return pytest.mark.parametrize(
        ("objective", "columns"), groups, ids=lambda value: value if isinstance(value, str) else "-".join(value)
    )


def files_of(objective, columns, folder):
    """A file of one row in every layout that becomes these columns."""
    parts = []
    for name, (kind, row, options, expected) in LAYOUTS.items():
        made = set(expected) & {"prompt", "completion", "messages", "chosen", "rejected", "label"}
        if kind == objective and made == set(columns) and not isinstance(expected.get("prompt"), str):
            file = folder / f"{name}.json"
            file.write_text(json.dumps([row]))
            parts.append({"path": str(file), **options})
    return parts


@each_group([*GROUPS, *SLOW])
def test_files_of_every_layout_can_be_mixed(objective, columns, tmp_path):
    parts = files_of(objective, columns, tmp_path)
    rows, _ = load_rows(parts, name="data", check=CHECKS[objective])
    assert len(rows.dataset) == len(parts) > 1
    assert set(columns) <= set(rows.dataset.column_names)
    check_dataset(rows.dataset, name="data", faults=CHECKS[objective], origin=rows.origin)


@each_group([*GROUPS, *(pytest.param(*group, marks=pytest.mark.slow) for group in SLOW)])
def test_files_of_every_layout_are_trained_on(objective, columns, tmp_path):
    parts = files_of(objective, columns, tmp_path)
    size = {"per_device_train_batch_size": 1, "max_completion_length": 4} if objective == "ppo" else {}
    config = HBATConfig(
        output_dir=str(tmp_path / "run"), objectives=[objective], num_rounds=1, disable_tqdm=True,
        **{objective: runs.section(max_steps=1, per_device_train_batch_size=len(parts)) | size},
    )  # fmt: skip
    reward = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
    run = HBATTrainer(
        cases.tiny_llama(), config, {objective: parts}, processing_class=cases.tiny_tokenizer(),
        **(reward if objective == "ppo" else {}),
    )  # fmt: skip
    assert len(run.train_dataset[objective]) == len(parts) > 1
    assert run.train().global_step == 1
