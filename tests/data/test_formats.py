import pytest
from messages import CALL, IMAGE, SYSTEM, TOOL, assistant, dialogue, user

from hbat.data.formats import preference_faults, sft_faults

NO_ANSWER = TOOL | {"content": None}

GOOD_SFT = [
    {"text": "Any text at all."},
    {"text": "\n\nHuman: Hi\n\nAssistant: Hello"},
    {"text": "A play.\nUser: Hi\nAssistant:"},
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"},
    {"prompt": [user()], "completion": [assistant()]},
    {"prompt": [SYSTEM, user()], "completion": [assistant()], "tools": None},
    {"prompt": [user(), CALL, TOOL], "completion": [assistant()]},
    {"messages": [user(), assistant(), user("And red?"), assistant()]},
    {"messages": [{"role": "developer", "content": "Be brief."}, user(), CALL, TOOL, TOOL, assistant()]},
    {"messages": [IMAGE, assistant([{"type": "text", "text": "A cat."}])], "images": []},
    {"messages": [user("Sum this up:\nHuman: hi\nAssistant: hello"), assistant()]},
    {"messages": [user(), assistant("components:\n  schemas:\n    User:\n      type: object")]},
    {"messages": [user(), assistant("User:\n  type: object")]},
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    {"messages": [user(), assistant()], "tools": '[{"type": "function"}]', "chat_template_kwargs": {}},
    {"prompt": [user()], "completion": [assistant()], "messages": [user(), assistant()], "text": "Hi"},
    {"input_ids": [1, 2, 3]},
    {"input_ids": [1, 2, 3], "seq_lengths": [2, 1], "assistant_masks": [0, True, False]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "completion_mask": [0, 1, 1]},
]

GOOD_PAIRS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("No idea.")]},
    {"prompt": [user()], "chosen": [CALL, TOOL, assistant()], "rejected": [assistant()]},
    {"chosen": [user(), assistant()], "rejected": [user(), assistant("No idea.")]},
    {"chosen": [user(), CALL, TOOL, assistant()], "rejected": [user(), assistant("No idea.")]},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go away"},
    {"prompt": [IMAGE], "chosen": [assistant("A cat.")], "rejected": [assistant("A dog.")], "images": []},
]


@pytest.mark.parametrize("row", GOOD_SFT)
def test_a_good_sft_row_has_no_fault(row):
    assert list(sft_faults(row)) == []


@pytest.mark.parametrize("row", GOOD_PAIRS)
def test_a_good_pair_has_no_fault(row):
    assert list(preference_faults(row)) == []


FAULTY_SFT = [
    ("missing value", "text", {"text": None}),
    ("not text", "text", {"text": 3}),
    ("not text", "text", {"text": [user()]}),
    ("empty text", "text", {"text": " \n"}),
    ("role marker", "text", {"text": "Assistant: It scatters."}),
    ("empty text", "completion", {"prompt": "Hi", "completion": ""}),
    ("missing column", "completion", {"prompt": "Hi", "messages": [user(), assistant()]}),
    ("missing column", "text", {"story": "Hi"}),
    ("mixed formats", "completion", {"prompt": [user()], "completion": "Hello"}),
    ("wrong last turn", "prompt[1].role", {"prompt": [user(), assistant()], "completion": [assistant()]}),
    ("wrong first turn", "completion[0].role", {"prompt": [user()], "completion": [user(), assistant()]}),
    ("role marker", "completion", {"prompt": "Hi", "completion": "Hello\nHuman: Bye"}),
    ("empty conversation", "messages", {"messages": []}),
    ("not text", "messages", {"messages": "Hello"}),
    ("not a message", "messages[0]", {"messages": ["Hello"]}),
    ("message without role", "messages[0].role", {"messages": [{"from": "user", "value": "Hi"}, assistant()]}),
    ("message without role", "messages[0].role", {"messages": [{"role": None, "content": "Hi"}, assistant()]}),
    ("message without content", "messages[0].content", {"messages": [{"role": "user"}, assistant()]}),
    ("message without content", "messages[1].content", {"messages": [user(), assistant(None)]}),
    ("not text", "messages[1].content", {"messages": [user(), assistant(True)]}),
    ("not text", "messages[1].content", {"messages": [user(), assistant(["Hello"])]}),
    ("empty turn", "messages[0].content", {"messages": [user("  "), assistant()]}),
    ("empty turn", "messages[1].content", {"messages": [user(), assistant([])]}),
    ("empty turn", "messages[1].content", {"messages": [user(), assistant([{"type": "text", "text": ""}])]}),
    ("unknown role", "messages[1].role", {"messages": [user(), {"role": "asistant", "content": "x"}, assistant()]}),
    ("repeated role", "messages[1].role", {"messages": [user(), user(), assistant()]}),
    ("repeated role", "messages[2].role", {"messages": [user(), assistant(), assistant()]}),
    ("wrong last turn", "messages[0].role", {"messages": [user()]}),
    ("role marker", "messages[1].content", {"messages": [user(), assistant("Fine.  Human: And you?")]}),
    ("role marker", "messages[1].content", {"messages": [user(), assistant("Fine.\n\nUser: And you?")]}),
    ("role marker", "messages[1].content", {"messages": [user(), assistant("Assistant: Fine.")]}),
    ("role marker", "messages[0].content", {"messages": [user("Human: Hi"), assistant()]}),
    ("message without role", "conversations[0].from", {"conversations": [user(), assistant()]}),
    (
        "empty turn",
        "conversations[1].value",
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": ""}]},
    ),
    ("repeated role", "text", {"text": "Human: Hi\n\nAssistant: Hello\n\nAssistant: Hello?"}),
    ("bad token ids", "input_ids", {"input_ids": []}),
    ("bad token ids", "input_ids", {"input_ids": None}),
    ("bad token ids", "input_ids[1]", {"input_ids": [1, 2.5]}),
    ("bad token ids", "input_ids[1]", {"input_ids": [1, -1]}),
    ("bad token ids", "labels", {"input_ids": [1, 2], "labels": [1]}),
    ("bad token ids", "labels", {"input_ids": [1, 2], "labels": [-100, -100]}),
    ("bad token ids", "labels", {"input_ids": [1, 2], "labels": None}),
    ("bad token ids", "labels[1]", {"input_ids": [1, 2], "labels": [1, -101]}),
    ("bad token ids", "labels[0]", {"input_ids": [1, 2], "labels": [True, 2]}),
    ("bad token ids", "completion_mask[1]", {"input_ids": [1, 2], "completion_mask": [0, None]}),
    ("bad token ids", "seq_lengths", {"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}),
    ("message without content", "messages[2].content", {"messages": [user(), CALL, NO_ANSWER, assistant()]}),
    ("reserved column", "labels", {"text": "Hi", "labels": "good"}),
    ("reserved column", "completion_mask", {"messages": [user(), assistant()], "completion_mask": [1]}),
    ("reserved column", "text", {"prompt": "Hi", "completion": " Hello", "text": "Hi Hello"}),
    ("mixed formats", "messages", {"prompt": "Hi", "completion": " Hello", "messages": [user(), assistant()]}),
    ("mixed formats", "conversations", {"prompt": "Hi", "completion": " Hello", "conversations": [[]]}),
    ("mixed formats", "chosen", {"conversations": [{"from": "assistant", "value": "Hi"}], "chosen": []}),
    ("mixed formats", "chosen", {"messages": [user(), assistant()], "chosen": "Hello"}),
    ("bad tools", "tools", {"messages": [user(), assistant()], "tools": "look"}),
    ("bad tools", "tools", {"messages": [user(), assistant()], "tools": "[" * 2000}),
    ("bad tools", "tools", {"messages": [user(), assistant()], "tools": ["look"]}),
    ("bad tools", "tools", {"messages": [user(), assistant()], "tools": 3}),
    (
        "bad template arguments",
        "chat_template_kwargs",
        {"messages": [user(), assistant()], "chat_template_kwargs": None},
    ),
]


@pytest.mark.parametrize(("kind", "field", "row"), FAULTY_SFT)
def test_a_faulty_sft_row_is_named_by_kind_and_field(kind, field, row):
    assert [(fault.kind, fault.field) for fault in sft_faults(row)] == [(kind, field)]


FAULTY_PAIRS = [
    ("missing column", "rejected", {"prompt": "Hi", "chosen": "Hello"}),
    ("missing column", "chosen", {"input_ids": [1]}),
    ("missing value", "rejected", {"prompt": "Hi", "chosen": "Hello", "rejected": None}),
    ("not text", "chosen", {"prompt": "Hi", "chosen": True, "rejected": "Hello"}),
    ("empty text", "chosen", {"prompt": "Hi", "chosen": "", "rejected": "Hello"}),
    (
        "mixed formats",
        "prompt",
        {"prompt": "Hi", "chosen": [user(), assistant()], "rejected": [user(), assistant("x")]},
    ),
    ("empty conversation", "chosen", {"prompt": [user()], "chosen": [], "rejected": [assistant()]}),
    ("empty turn", "chosen[0].content", {"prompt": [user()], "chosen": [assistant("")], "rejected": [assistant()]}),
    ("not text", "rejected[0].content", {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant(True)]}),
    (
        "wrong last turn",
        "prompt[0].role",
        {"prompt": [{"role": "system", "content": "x"}], "chosen": [assistant()], "rejected": [assistant("x")]},
    ),
    (
        "wrong first turn",
        "chosen[0].role",
        {"prompt": [user()], "chosen": [user("x"), assistant()], "rejected": [assistant()]},
    ),
    ("identical pair", "rejected", {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant()]}),
    ("identical pair", "rejected", {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}),
    ("identical pair", "rejected", {"chosen": "Hello", "rejected": "Hello"}),
    ("nearly identical pair", "rejected", {"prompt": "Hi", "chosen": "Hello you", "rejected": "hello  you\n"}),
    (
        "nearly identical pair",
        "rejected",
        {"prompt": [user()], "chosen": [assistant("A b")], "rejected": [assistant("a B ")]},
    ),
    ("prompts differ", "rejected[0]", {"chosen": [user(), assistant()], "rejected": [user("x"), assistant()]}),
    (
        "prompts differ",
        "rejected[1]",
        {"chosen": [user(), assistant(), user(), assistant()], "rejected": [user(), assistant("x")]},
    ),
    ("no prompt", "chosen", {"chosen": [assistant()], "rejected": [assistant("x")]}),
    ("prompts differ", "rejected", {"chosen": dialogue("Hi", "Hello"), "rejected": dialogue("Hey", "Go away")}),
    ("empty turn", "chosen", {"chosen": dialogue("Hi", " "), "rejected": dialogue("Hi", "Go away")}),
    ("role marker", "chosen", {"chosen": dialogue("Hi", "Human: Oh"), "rejected": dialogue("Hi", "Go away")}),
    ("wrong last turn", "rejected", {"prompt": dialogue("Hi", "")[:-1], "chosen": " A", "rejected": " B\n\nHuman: C"}),
    ("no prompt", "chosen", {"promt": "Hi", "chosen": "Hello", "rejected": "Go away"}),
    ("empty text", "chosen", {"chosen": "The sky is ", "rejected": "The sky is blue"}),
    ("role marker", "chosen", {"chosen": "The sky is blue.  Human: Why?", "rejected": "The sky is green"}),
    ("mixed formats", "messages", {"prompt": "Hi", "chosen": "A", "rejected": "B", "messages": [user(), assistant()]}),
    ("mixed formats", "messages", {"chosen": [user(), assistant()], "rejected": [user(), CALL], "messages": "Hi"}),
    (
        "reserved column",
        "ref_chosen_logps",
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "ref_chosen_logps": -3.5},
    ),
    ("bad tools", "tools", {"prompt": [user()], "chosen": [assistant()], "rejected": [CALL], "tools": {}}),
]


@pytest.mark.parametrize(("kind", "field", "row"), FAULTY_PAIRS)
def test_a_faulty_pair_is_named_by_kind_and_field(kind, field, row):
    assert [(fault.kind, fault.field) for fault in preference_faults(row)] == [(kind, field)]


@pytest.mark.parametrize(("role", "meant"), [("human", "user"), ("gpt", "assistant"), ("Assistant", "assistant")])
def test_an_unknown_role_gets_the_nearest_known_one(role, meant):
    first, *_ = sft_faults({"messages": [{"role": role, "content": "Hi"}, assistant()]})
    assert first.kind == "unknown role"
    assert first.problem.endswith(f"Did you mean `{meant}`?")


def test_a_text_column_of_another_name_is_checked():
    assert [fault.field for fault in sft_faults({"story": ""}, text_field="story")] == ["story"]


def test_a_turn_of_a_written_out_dialogue_is_named_by_its_number():
    row = {"chosen": dialogue("Hi", "Hello", "Bye", ""), "rejected": dialogue("Hi", "Hello", "Bye", "Bye")}
    assert [fault.problem for fault in preference_faults(row)] == ["turn 4 of the text: the content is empty"]


def test_tokenized_preference_data_is_refused_with_the_reason():
    (fault,) = preference_faults({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]})
    assert "DPO does not accept tokenized data (`prompt_ids`)" in fault.problem
