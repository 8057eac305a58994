"""Rows that are good in themselves, but not for this model or tokenizer."""

import logging

import cases
import pytest
import runs
from datasets import Dataset
from messages import SYSTEM, assistant, user

from hbat.config.hbat import HBATConfig
from hbat.data.formats import kto_faults, preference_faults, prompt_faults, sft_faults
from hbat.data.load import DatasetError
from hbat.data.template import Limits, row_fit
from hbat.trainer import HBATTrainer

TOOL = {"role": "tool", "content": "3"}


def check_of(row):
    """The check of the objective that rows with these columns are for."""
    if "label" in row:
        return kto_faults
    if "chosen" in row:
        return preference_faults
    return sft_faults if len(row) > 1 or "prompt" not in row else prompt_faults


def faults(row, tokenizer=None, vocabulary=cases.VOCABULARY_SIZE, room=None):
    fit = row_fit(
        check_of(row),
        tokenizer or cases.strict_tokenizer(),
        Limits(vocabulary, room, "the model has too few positions"),
    )
    return [(fault.kind, fault.field) for fault in fit(row)]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "No conversation at all."},
        {"prompt": "Hi", "completion": " Hello", "messages": [SYSTEM, user(), assistant()]},
        {"prompt": [user()], "completion": [assistant()], "label": True},
        {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("No.")], "messages": [SYSTEM]},
        {"chosen": [user(), assistant()], "rejected": [user(), assistant("No.")], "conversations": [[]]},
        {"messages": [user(), assistant()]},
        {"prompt": [user()], "completion": [assistant()]},
        {"prompt": [user(), assistant(), user()]},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"input_ids": [0, cases.VOCABULARY_SIZE - 1], "labels": [-100, 3]},
    ],
)
def test_a_row_that_fits_has_no_fault(row):
    assert faults(row) == []


@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("messages", {"messages": [SYSTEM, user(), assistant()]}),
        ("prompt", {"prompt": [SYSTEM, user()], "chosen": [assistant()], "rejected": [assistant("No.")]}),
        (
            "rejected",
            {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("a"), TOOL, assistant("b")]},
        ),
        ("chosen", {"chosen": [SYSTEM, user(), assistant()], "rejected": [user(), assistant("No.")]}),
        ("prompt", {"prompt": [SYSTEM, user()]}),
        ("prompt", {"prompt": [SYSTEM, user()], "completion": [assistant()], "label": True}),
        ("conversations", {"conversations": [{"from": "system", "value": "a"}, {"from": "assistant", "value": "b"}]}),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(field, row):
    assert faults(row) == [("template", field)]


def test_content_blocks_are_refused_where_the_template_takes_only_text():
    row = {"messages": [user([{"type": "text", "text": "Hi"}]), assistant()]}
    assert faults(row, cases.tiny_tokenizer()) == [("template", "messages")]


def test_a_tokenizer_without_a_template_takes_no_conversation():
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    assert faults({"messages": [user(), assistant()]}, tokenizer) == [("template", "messages")]
    assert faults({"text": "Hi"}, tokenizer) == []


def test_a_token_that_the_model_does_not_have_is_named():
    assert faults({"input_ids": [1, 900]}) == [("unknown token", "input_ids[1]")]
    assert faults({"input_ids": [1, 2], "labels": [-100, 261]}) == [("unknown token", "labels[1]")]


def test_a_template_is_tried_once_for_each_order_of_roles():
    class Counting:
        calls = 0

        def apply_chat_template(self, *args, **kwargs):
            self.calls += 1

        def __len__(self):
            return 1

    tokenizer = Counting()
    check = row_fit(sft_faults, tokenizer, Limits(cases.VOCABULARY_SIZE))
    for number in range(50):
        assert not list(check({"messages": [user(str(number)), assistant(str(number))]}))
    assert tokenizer.calls == 1
    assert not list(check({"messages": [SYSTEM, user(), assistant()]}))
    assert tokenizer.calls == 2


def test_only_data_sets_with_messages_or_tokens_are_checked():
    check = row_fit(sft_faults, cases.tiny_tokenizer(), Limits(cases.VOCABULARY_SIZE))
    assert not check.concerns(cases.sft_rows(2))
    assert check.concerns(cases.sft_rows(2, conversational=True))
    assert check.concerns(Dataset.from_list([{"input_ids": [1]}]))


@pytest.mark.parametrize("extra", [{"chosen": [1, 2]}, {"messages": [{"role": "x"}]}, {"input_ids": 3}])
def test_columns_that_the_objective_does_not_read_are_left_alone(extra):
    fit = row_fit(prompt_faults, cases.strict_tokenizer(), Limits(cases.VOCABULARY_SIZE))
    assert list(fit({"prompt": [user()]} | extra)) == []


def test_a_check_of_the_users_own_says_nothing_about_what_is_read():
    assert row_fit(lambda row: iter(()), cases.strict_tokenizer(), Limits(cases.VOCABULARY_SIZE)) is None


# --- in a run --------------------------------------------------------------------------------------------------------


def build(rows, folder, tokenizer=None, **options):
    return HBATTrainer(
        model=cases.tiny_llama(),
        args=HBATConfig(
            output_dir=str(folder), objectives=["sft"], num_rounds=1, ewc=None, sft=runs.section(), **options
        ),
        train_dataset={"sft": Dataset.from_list(rows)},
        processing_class=tokenizer or cases.strict_tokenizer(),
    )


ROWS = [{"messages": [user(), assistant()]} for _ in range(9)] + [{"messages": [SYSTEM, user(), assistant()]}]


def test_a_row_late_in_the_data_is_named_before_anything_is_trained(tmp_path):
    expected = (
        r"^train_dataset\['sft'\], row 9, field `messages`: the tokenizer's chat template rejects it: .*System role"
    )
    with pytest.raises(DatasetError, match=expected):
        build(ROWS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_such_rows_are_dropped_and_counted_where_that_is_asked_for(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hbat"):
        trainer = build(ROWS, tmp_path / "out", on_bad_rows="drop")
    assert len(trainer.train_dataset["sft"]) == 9
    assert "train_dataset['sft']: dropped 1 of 10 rows (template: 1)." in caplog.text


def test_a_token_beyond_the_vocabulary_is_named_before_anything_is_trained(tmp_path):
    with pytest.raises(DatasetError, match=r"row 1, field `input_ids\[0\]`: the model has no token 5000"):
        build([{"input_ids": [1, 2]}, {"input_ids": [5000]}], tmp_path / "out")


def test_a_template_of_the_section_takes_the_place_of_the_tokenizers(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(cases.CHAT_TEMPLATE, encoding="utf-8")
    trainer = HBATTrainer(
        model=cases.tiny_llama(),
        args=HBATConfig(
            output_dir=str(tmp_path / "out"),
            objectives=["sft"],
            num_rounds=1,
            ewc=None,
            sft=runs.section(chat_template_path=str(template)),
        ),
        train_dataset={"sft": Dataset.from_list(ROWS)},
        processing_class=cases.strict_tokenizer(),
    )
    assert len(trainer.train_dataset["sft"]) == 10


def test_images_are_refused_where_the_model_reads_text_alone(tmp_path):
    rows = [{"messages": [user(), assistant()], "images": None}] * 2
    with pytest.raises(DatasetError, match=r"^train_dataset\['sft'\] has the column `images`, but .* no processor"):
        build(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ANY_ROLE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
KNOWN_ROLES = (
    "{% for message in messages %}{% if message['role'] in ['user', 'assistant'] %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("role", ["environment", "ipython", "observation", "function", "document", "critic"])
@pytest.mark.parametrize(("template", "expected"), [(ANY_ROLE, []), (KNOWN_ROLES, ["template"])])
def test_the_template_decides_on_a_role_that_is_not_a_usual_one(role, template, expected):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = template
    turn = {"role": role, "content": " result "}
    whole, asked = {"messages": [user(), assistant(), turn, assistant()]}, {"prompt": [user(), assistant(), turn]}
    for row in (whole, asked):
        assert [*check_of(row)(row)] == []
        assert [kind for kind, _ in faults(row, tokenizer)] == expected


@pytest.mark.parametrize(
    ("row", "field", "tokens"),
    [
        ({"text": "four"}, "text", 5),  # with the end token that TRL adds
        ({"prompt": "four", "completion": "more"}, "completion", 9),
        ({"prompt": "four", "chosen": "b", "rejected": "more"}, "rejected", 9),
        ({"prompt": "four"}, "prompt", 4),
        ({"prompt": [user("four")]}, "prompt", 4),
        ({"messages": [user("four"), assistant("more")]}, "messages", 8),
        ({"input_ids": [1, 2, 3, 4]}, "input_ids", 4),
    ],
)
def test_a_row_with_more_tokens_than_the_model_has_room_for_is_named(row, field, tokens):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert faults(row, tokenizer, room=tokens) == []
    assert faults(row, tokenizer, room=tokens - 1) == [("too long", field)]


def test_tokens_beyond_the_vocabulary_are_found_in_text_where_the_tokenizer_has_more():
    tokenizer = cases.tiny_tokenizer()
    assert faults({"prompt": "a", "completion": "b<call>"}, tokenizer) == []
    tokenizer.add_tokens(["<call>"])
    assert faults({"prompt": "a", "completion": "b"}, tokenizer, len(tokenizer) - 1) == []
    assert faults({"prompt": "a", "completion": "b<call>"}, tokenizer, len(tokenizer) - 1) == [
        ("unknown token", "completion")
    ]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = [
    user(),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    assistant(),
]
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        ("{{ messages }}", {"messages": CALLED}, None),
        ("{{ tools }}{{ messages }}", {"messages": [user(), assistant()], "tools": [ADD]}, None),
        ("{% for turn in messages %}{{ turn['content'] }}{% endfor %}", {"messages": CALLED}, "the call of 'add'"),
        ("{{ messages }}", {"messages": [user(), assistant()], "tools": [ADD]}, "the tool 'add'"),
        ("{{ messages }}", {"messages": [user(), assistant()], "tools": '[{"name": "add"}]'}, "the tool 'add'"),
    ],
)
def test_calls_and_tools_that_the_template_leaves_out_are_a_fault(template, row, problem):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = template
    found = [fault.problem for fault in row_fit(sft_faults, tokenizer, Limits(cases.VOCABULARY_SIZE))(row)]
    assert (not found) if problem is None else (f"leaves out {problem}. Set a `chat_template`" in found[0])
