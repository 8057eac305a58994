"""A checksum of rows that sees every value, and nothing of how they are stored."""

import datetime as dt
import random

import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.data import digest as module
from hbat.data.digest import data_digest


def rows(count=53):
    choose = random.Random(1)
    return [
        {
            "prompt": "".join(choose.choices("abcdé漢 ", k=choose.randrange(12))),
            "label": choose.random() < 0.5,
            "score": choose.gauss(0, 1),
            "number": choose.randrange(-5, 5) if choose.random() < 0.8 else None,
            "messages": [
                {"role": "user", "content": choose.choice(["hello", "", None])} for _ in range(choose.randrange(4))
            ],
            "ids": [choose.randrange(9) for _ in range(choose.randrange(3))] if choose.random() < 0.8 else None,
            "nested": [[str(choose.randrange(9))] * choose.randrange(3)] * choose.randrange(3),
            "extra": {"b": choose.choice([1.5, None]), "a": "x"} if choose.random() < 0.8 else None,
            "nothing": None,
        }
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 10)
    monkeypatch.setattr(module, "_GATHERED_ROWS", 20)


@pytest.fixture(scope="module")
def dataset():
    return Dataset.from_list(rows())


def test_the_same_rows_stored_otherwise_have_the_same_checksum(dataset, tmp_path):
    expected = data_digest(dataset)
    dataset.save_to_disk(tmp_path / "disk", num_shards=4)
    dataset.to_parquet(tmp_path / "rows.parquet", batch_size=7)
    count, turned = len(dataset), list(reversed(range(len(dataset))))
    stored = {
        "again": Dataset.from_list(rows()),
        "from disk": load_from_disk(tmp_path / "disk"),
        "from a file": load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train"),
        "in chunks": concatenate_datasets([dataset.select(range(13)), dataset.select(range(13, count))]),
        "picked": dataset.select(turned).select(turned),
        "sliced": Dataset.from_list(rows()[:3] + rows() + rows()[:3]).select(range(3, 3 + count)),
        "picked from more": Dataset.from_list(rows() + rows()).select([*range(20), *range(count + 20, 2 * count)]),
        "other order of columns": dataset.select_columns(sorted(dataset.column_names, reverse=True)),
        "torch": dataset.with_format("torch", columns=["score"]),
    }
    assert {name: data_digest(dataset) for name, dataset in stored.items()} == dict.fromkeys(stored, expected)


def test_a_change_of_any_value_shows(dataset):
    expected, seen = data_digest(dataset), set()
    for name, value in [
        ("prompt", "other"), ("prompt", None), ("label", None), ("score", 0.125), ("number", 77),
        ("messages", [{"role": "system", "content": "hello"}]),
        ("messages", [{"role": "user", "content": "hellp"}]), ("ids", [1, 2, 3]), ("nested", [["1"], []]),
        ("nested", [[], ["1"]]), ("extra", {"b": 2.5, "a": "x"}), ("extra", {"b": 2.5, "a": "y"}),
    ]:  # fmt: skip
        for index in (11, 52):
            changed = rows()
            assert changed[index][name] != value
            changed[index][name] = value
            seen.add(data_digest(Dataset.from_list(changed, features=dataset.features)))
    assert expected not in seen
    assert len(seen) == 12 * 2


def test_order_number_and_names_show(dataset):
    others = [
        dataset.select([1, 0, *range(2, len(dataset))]),
        dataset.select(range(len(dataset) - 1)),
        dataset.rename_column("prompt", "question"),
        dataset.rename_columns({"prompt": "x"}).rename_columns({"x": "prompts"}),
        dataset.remove_columns(["ids"]),
    ]
    assert len({data_digest(other) for other in [dataset, *others]}) == 6


def test_text_that_is_cut_elsewhere_shows():
    found = {
        data_digest(Dataset.from_dict({"a": values}))
        for values in (["ab", "c"], ["a", "bc"], ["abc", ""], ["", "abc"], ["abc", None], [None, "abc"])
    }
    assert len(found) == 6
    lists = {
        data_digest(Dataset.from_dict({"a": values}))
        for values in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3], []], [[1, 2, 3], None], [None, [1, 2, 3]])
    }
    assert len(lists) == 5


def test_large_texts_are_texts():
    small = Dataset.from_dict({"a": ["x", None, "yz"]})
    large = small.cast_column("a", Value("large_string"))
    assert data_digest(small) == data_digest(large)


def test_what_lies_behind_a_missing_value_does_not_show():
    hidden = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer((5).to_bytes(8, "little") * 2)])
    plain = pa.array([5, None], pa.int64())
    digests = {data_digest(Dataset(pa.table({"a": values}))) for values in (hidden, plain)}
    assert len(digests) == 1


def test_values_of_rare_types_show():
    days = [dt.date(2024, 1, 1), dt.date(2024, 1, 2), None]
    for values in (days, [b"a", b"b", None], [True, False, None]):
        one = Dataset.from_dict({"a": values})
        other = Dataset.from_dict({"a": [values[1], *values[1:]]})
        assert data_digest(one) == data_digest(Dataset.from_dict({"a": values}))
        assert data_digest(one) != data_digest(other)


def test_matrices_show():
    features = Features({"a": Array2D((2, 2), "float32")})
    one, other = (Dataset.from_dict({"a": [[[1, 2], [3, value]]]}, features=features) for value in (4, 5))
    assert data_digest(one) != data_digest(other)


def test_an_empty_data_set_has_a_checksum():
    assert data_digest(Dataset.from_dict({"a": []})) == data_digest(Dataset.from_dict({"a": []}))


def test_where_a_function_transforms_rows_what_it_makes_of_them_counts():
    dataset = Dataset.from_dict({"a": [str(index) for index in range(30)]})

    def made(text):
        return dataset.with_transform(lambda batch: {"b": [text + value for value in batch["a"]]})

    assert data_digest(made("x")) == data_digest(made("x"))
    assert len({data_digest(rows) for rows in (dataset, made("x"), made("y"))}) == 3


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.one_of(st.none(), st.text(max_size=4)), max_size=3), min_size=1, max_size=25),
    st.data(),
)
def test_any_cut_of_any_lists_gives_the_same_checksum(values, data):
    features = Features({"a": [Value("string")]})
    whole = Dataset.from_dict({"a": values}, features=features)
    cut = data.draw(st.integers(0, len(values)))
    parts = [Dataset.from_dict({"a": part}, features=features) for part in (values[:cut], values[cut:])]
    assert data_digest(concatenate_datasets(parts)) == data_digest(whole)
