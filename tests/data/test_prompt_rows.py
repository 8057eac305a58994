"""Rows of prompts, for trainers that generate the answers themselves, and rows of KTO."""

import pytest
from datasets import Dataset
from messages import CALL, IMAGE, SYSTEM, TOOL, assistant, user

from hbat.data.check import check_dataset
from hbat.data.formats import kto_faults, prompt_faults
from hbat.data.load import DatasetError

GOOD_PROMPTS = [
    {"prompt": "The sky is"},
    {"prompt": "The sky is", "answer": None, "label": 3},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant: It is"},
    {"prompt": [user()]},
    {"prompt": [user(), assistant(), user("And red?")]},
    {"prompt": [SYSTEM, user()]},
    {"prompt": [user(), CALL, TOOL]},
    {"prompt": [IMAGE], "images": []},
]

GOOD_KTO = [
    {"prompt": "The sky is", "completion": " blue.", "label": True},
    {"prompt": [user()], "completion": [assistant()], "label": False},
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"chosen": [user(), assistant()], "rejected": [user(), assistant("No idea.")]},
]


@pytest.mark.parametrize("row", GOOD_PROMPTS)
def test_a_good_prompt_has_no_fault(row):
    assert list(prompt_faults(row)) == []


@pytest.mark.parametrize("row", GOOD_KTO)
def test_a_good_row_of_kto_has_no_fault(row):
    assert list(kto_faults(row)) == []


FAULTY_PROMPTS = [
    ("missing column", "prompt", {"messages": [user()]}),
    ("missing value", "prompt", {"prompt": None}),
    ("not text", "prompt", {"prompt": 3}),
    ("empty text", "prompt", {"prompt": " \n"}),
    ("empty conversation", "prompt", {"prompt": []}),
    ("not a message", "prompt[0]", {"prompt": ["Hi"]}),
    ("wrong last turn", "prompt[1].role", {"prompt": [user(), assistant()]}),
    ("unknown role", "prompt[0].role", {"prompt": [{"role": "human", "content": "Hi"}]}),
    ("empty turn", "prompt[0].content", {"prompt": [user(" ")]}),
    ("repeated role", "prompt[1].role", {"prompt": [user(), user("And?")]}),
    ("empty turn", "prompt", {"prompt": "Human: \n\nAssistant:"}),
    ("bad tools", "tools", {"prompt": [user()], "tools": "look"}),
]

FAULTY_KTO = [
    ("missing column", "prompt", {"completion": "a", "label": True}),
    ("missing column", "completion", {"prompt": "a", "label": True}),
    ("missing column", "label", {"prompt": "a", "completion": "b"}),
    ("missing value", "label", {"prompt": "a", "completion": "b", "label": None}),
    ("not a label", "label", {"prompt": "a", "completion": "b", "label": 1}),
    ("not a label", "label", {"prompt": "a", "completion": "b", "label": "good"}),
    ("empty text", "completion", {"prompt": "a", "completion": "", "label": True}),
    ("mixed formats", "completion", {"prompt": [user()], "completion": "b", "label": True}),
    (
        "wrong last turn",
        "prompt[1].role",
        {"prompt": [user(), assistant()], "completion": [assistant()], "label": True},
    ),
    ("identical pair", "rejected", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    ("reserved column", "label", {"prompt": "a", "chosen": "b", "rejected": "c", "label": True}),
    ("reserved column", "completion", {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}),
    ("mixed formats", "messages", {"prompt": "a", "completion": "b", "label": True, "messages": [user()]}),
    ("reserved column", "ref_logps", {"prompt": "a", "completion": "b", "label": True, "ref_logps": -3.5}),
    ("bad tools", "tools", {"prompt": [user()], "completion": [assistant()], "label": True, "tools": [3]}),
]


@pytest.mark.parametrize(("kind", "field", "row"), FAULTY_PROMPTS)
def test_what_is_wrong_with_a_prompt_is_named_with_its_field(kind, field, row):
    assert (kind, field) in [(fault.kind, fault.field) for fault in prompt_faults(row)]


@pytest.mark.parametrize(("kind", "field", "row"), FAULTY_KTO)
def test_what_is_wrong_with_a_row_of_kto_is_named_with_its_field(kind, field, row):
    assert (kind, field) in [(fault.kind, fault.field) for fault in kto_faults(row)]


def test_the_message_about_a_data_set_says_what_it_needs():
    rows = Dataset.from_list([{"messages": [user()]}])
    with pytest.raises(DatasetError, match=r"no column `prompt`.*Online objectives expect `prompt`"):
        check_dataset(rows, name="data", faults=prompt_faults)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "rating": True}])
    with pytest.raises(DatasetError, match=r"no column `label`.*KTO expects `prompt`, `completion`, `label`; or"):
        check_dataset(rows, name="data", faults=kto_faults)
