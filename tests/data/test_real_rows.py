"""Rows of public data sets: the faulty ones are refused, the clean ones pass."""

import gzip
import json

import pytest
from datasets import Dataset

from hbat.data.check import check_dataset, search
from hbat.data.formats import preference_faults, sft_faults
from hbat.data.load import DatasetError

#: The test files, or with `make test-all` the larger training files as well.
each_size = pytest.mark.parametrize("size", ["test", pytest.param("train", marks=pytest.mark.slow)])


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def faulty(shared_data):
    """Faulty rows of one public data set, as `{"source": ..., "kind": ..., "row": ...}`."""
    rows = read(shared_data / "malformed" / "real_rows.jsonl.gz")
    return lambda *sources: [entry for entry in rows if entry["source"] in sources]


def refusal(rows, faults):
    with pytest.raises(DatasetError) as caught:
        check_dataset(Dataset.from_list(rows), name="train_dataset['it']", faults=faults)
    assert str(caught.value).startswith("train_dataset['it'], row ")
    return {fault.kind for row in rows for fault in faults(row)} | set(search(Dataset.from_list(rows), faults).kinds)


def test_faulty_rows_with_their_own_columns_are_refused(faulty):
    for entry in faulty("hh_helpful", "pandalm"):
        rows = entry["row"] if isinstance(entry["row"], list) else [entry["row"]]
        with pytest.raises(DatasetError, match="has no column `chosen`"):
            check_dataset(Dataset.from_list(rows), name="train_dataset['it']", faults=preference_faults)


def test_faulty_rows_with_a_text_column_are_refused_where_the_text_shows_it(faulty):
    for entry in faulty("hh_helpful"):
        if entry["kind"] != "reply has the same role as its parent":
            assert refusal([entry["row"]], sft_faults) == {"role marker"}


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
def test_faulty_dialogues_of_hh_harmless_are_refused(convert, faulty):
    for entry in faulty("hh_harmless"):
        row = {side: convert(entry["row"][side]) for side in ("chosen", "rejected")}
        side, _, kind = entry["kind"].rpartition(": ")
        kinds = refusal([row], preference_faults)
        # The source counts "Human:" glued into a turn as the next turn; here it is a marker.
        accepted = {HARMLESS[kind]} | ({"role marker"} if kind.startswith("two turns") else set())
        assert kinds & accepted, (side, kind, kinds)


HELPFUL = {
    "reply has the same role as its parent": {"repeated role"},
    "role marker inside a message": {"role marker"},
    "empty message text": {"empty turn", "role marker"},
}


@pytest.mark.parametrize("prefix", ["", "Assistant:"])
def test_faulty_threads_of_hh_helpful_are_refused(prefix, faulty):
    for entry in faulty("hh_helpful"):
        thread = entry["row"] if isinstance(entry["row"], list) else [entry["row"]]
        turns = [{"role": turn["role"], "content": turn["text"].removeprefix(prefix).strip()} for turn in thread]
        row = {"messages": [{"role": "user", "content": "Hello"}, *turns]}
        assert refusal([row], sft_faults) & HELPFUL[entry["kind"]]


PANDALM = {"a response is empty": {"empty turn", "empty text"}, "a text field is not a string": {"not text"}}


@pytest.mark.parametrize("as_messages", [True, False])
def test_faulty_answers_of_pandalm_are_refused(as_messages, faulty):
    def answer(text):
        return [{"role": "assistant", "content": text}] if as_messages else text

    for entry in faulty("pandalm"):
        raw = entry["row"]
        question = f"{raw['instruction']}\n\n{raw['input']}"
        prompt = [{"role": "user", "content": question}] if as_messages else question
        row = {"prompt": prompt, "chosen": answer(raw["response1"]), "rejected": answer(raw["response2"])}
        assert {fault.kind for fault in preference_faults(row)} & PANDALM[entry["kind"]]


def test_a_pair_that_differs_in_capitals_is_refused(faulty):
    rows = [entry["row"] for entry in faulty("llmbar")]
    assert refusal(rows, preference_faults) == {"nearly identical pair"}


def test_every_reversed_pair_is_refused(faulty, shared_data):
    clean = [row for size in ("train", "test") for row in read(shared_data / f"preference/ukpconvarg_{size}.jsonl.gz")]
    known = {json.dumps(row) for row in clean}
    reversed_rows = [entry["row"] for entry in faulty("ukpconvarg")]
    others = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in reversed_rows]
    rows = [other for other in others if json.dumps(other) not in known]
    rows += [row for row in clean if row in others]
    assert len(rows) >= len(others)
    found = search(Dataset.from_list(rows + reversed_rows), preference_faults)
    assert found.rows == list(range(len(rows), len(rows) + len(reversed_rows)))
    assert set(found.kinds) == {"reversed pair"}


@each_size
def test_clean_instructions_have_no_fault(size, shared_data):
    files = [*shared_data.glob(f"sft/*_{size}.jsonl.gz"), *shared_data.glob(f"summarisation/*_sft_{size}.jsonl.gz")]
    assert len(files) > 5
    for file in files:
        rows = read(file)
        whole = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        assert not search(Dataset.from_list(rows), sft_faults).rows, file
        assert not search(Dataset.from_list(whole), sft_faults).rows, file


@each_size
def test_clean_pairs_have_no_fault(size, shared_data):
    files = [
        *shared_data.glob(f"preference/*_{size}.jsonl.gz"),
        *shared_data.glob(f"summarisation/*_preference_{size}.jsonl.gz"),
    ]
    assert len(files) > 5
    for file in files:
        rows = read(file)
        implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
        assert not search(Dataset.from_list(rows), preference_faults).rows, file
        assert not search(Dataset.from_list(implicit), preference_faults).rows, file
