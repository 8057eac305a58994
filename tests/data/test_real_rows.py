"""Rows as they stand in public data sets: the faulty ones are refused, the clean ones pass."""

import gzip
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from hbat.data.check import check_dataset, search
from hbat.data.formats import preference_faults, sft_faults
from hbat.data.load import DatasetError

DATA = Path(os.environ.get("HBAT_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def read(path):
    if not DATA.is_dir():
        pytest.skip("the data samples are not here; HBAT_SHARED_DATA names their folder")
    with gzip.open(DATA / path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def refusal(rows, faults):
    with pytest.raises(DatasetError) as caught:
        check_dataset(Dataset.from_list(rows), name="train_dataset['it']", faults=faults)
    assert str(caught.value).startswith("train_dataset['it'], row ")
    return {fault.kind for row in rows for fault in faults(row)} | set(search(Dataset.from_list(rows), faults).kinds)


def test_faulty_rows_with_their_own_columns_are_refused():
    for each in read("malformed/real_rows.jsonl.gz"):
        if each["source"] in {"hh_helpful", "pandalm"}:
            rows = each["row"] if isinstance(each["row"], list) else [each["row"]]
            with pytest.raises(DatasetError, match="has no column `chosen`"):
                check_dataset(Dataset.from_list(rows), name="train_dataset['it']", faults=preference_faults)


def test_faulty_rows_with_a_text_column_are_refused_where_the_text_shows_it():
    for each in read("malformed/real_rows.jsonl.gz"):
        if each["source"] == "hh_helpful" and each["kind"] != "reply has the same role as its parent":
            assert refusal([each["row"]], sft_faults) == {"role marker"}


def turns_of(text):
    parts = [part.partition(": ") for part in text.split("\n\n") if part]
    turns = []
    for role, _, content in parts:
        if role in {"Human", "Assistant"}:
            turns.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
        else:
            turns[-1]["content"] += f"\n\n{role}: {content}"
    return turns


HARMLESS = {
    "role marker inside a turn": "role marker",
    "two turns of one role in a row": "repeated role",
    "final assistant turn empty": "empty turn",
    "prompts of chosen and rejected differ": "prompts differ",
}


@pytest.mark.parametrize("convert", [str, turns_of])
def test_faulty_dialogues_of_hh_harmless_are_refused(convert):
    for each in read("malformed/real_rows.jsonl.gz"):
        if each["source"] == "hh_harmless":
            row = {side: convert(each["row"][side]) for side in ("chosen", "rejected")}
            side, _, kind = each["kind"].rpartition(": ")
            kinds = refusal([row], preference_faults)
            # The source's count takes "Human:" glued into a turn for the next turn; here it is the marker that it is.
            accepted = {HARMLESS[kind]} | ({"role marker"} if kind.startswith("two turns") else set())
            assert kinds & accepted, (side, kind, kinds)


HELPFUL = {
    "reply has the same role as its parent": {"repeated role"},
    "role marker inside a message": {"role marker"},
    "empty message text": {"empty turn", "role marker"},
}


@pytest.mark.parametrize("prefix", ["", "Assistant:"])
def test_faulty_threads_of_hh_helpful_are_refused(prefix):
    for each in read("malformed/real_rows.jsonl.gz"):
        if each["source"] == "hh_helpful":
            thread = each["row"] if isinstance(each["row"], list) else [each["row"]]
            turns = [{"role": one["role"], "content": one["text"].removeprefix(prefix).strip()} for one in thread]
            row = {"messages": [{"role": "user", "content": "Hello"}, *turns]}
            assert refusal([row], sft_faults) & HELPFUL[each["kind"]]


@pytest.mark.parametrize("as_messages", [True, False])
def test_faulty_answers_of_pandalm_are_refused(as_messages):
    def answer(text):
        return [{"role": "assistant", "content": text}] if as_messages else text

    for each in read("malformed/real_rows.jsonl.gz"):
        if each["source"] == "pandalm":
            raw = each["row"]
            question = f"{raw['instruction']}\n\n{raw['input']}"
            prompt = [{"role": "user", "content": question}] if as_messages else question
            row = {"prompt": prompt, "chosen": answer(raw["response1"]), "rejected": answer(raw["response2"])}
            expected = {
                "a response is empty": {"empty turn", "empty text"},
                "a text field is not a string": {"not text"},
            }
            kinds = {fault.kind for fault in preference_faults(row)}
            assert kinds & expected[each["kind"]]


def test_a_pair_that_differs_in_capitals_is_refused():
    rows = [each["row"] for each in read("malformed/real_rows.jsonl.gz") if each["source"] == "llmbar"]
    assert refusal(rows, preference_faults) == {"nearly identical pair"}


def test_every_reversed_pair_is_refused():
    clean = read("preference/ukpconvarg_train.jsonl.gz") + read("preference/ukpconvarg_test.jsonl.gz")
    known = {json.dumps(row) for row in clean}
    reversed_rows = [each["row"] for each in read("malformed/real_rows.jsonl.gz") if each["source"] == "ukpconvarg"]
    for row in reversed_rows:
        other = {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        rows = [row] if json.dumps(other) in known else [other, row]
        found = search(Dataset.from_list(clean + rows), preference_faults)
        assert found.rows == [len(clean) + len(rows) - 1]
        assert set(found.kinds) == {"reversed pair"}


def samples(kind):
    found = [
        path for folder in ("preference", "sft", "summarisation") for path in sorted((DATA / folder).glob("*.gz"))
    ]
    return [str(path.relative_to(DATA)) for path in found if ("preference" in str(path.relative_to(DATA))) == kind]


def test_clean_instructions_have_no_fault():
    read("malformed/real_rows.jsonl.gz")
    for path in samples(kind=False):
        rows = read(path)
        whole = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        assert not search(Dataset.from_list(rows), sft_faults).rows, path
        assert not search(Dataset.from_list(whole), sft_faults).rows, path


def test_clean_pairs_have_no_fault():
    read("malformed/real_rows.jsonl.gz")
    for path in samples(kind=True):
        rows = read(path)
        implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
        assert not search(Dataset.from_list(rows), preference_faults).rows, path
        assert not search(Dataset.from_list(implicit), preference_faults).rows, path
