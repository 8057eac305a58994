import gzip
import json

import datasets
import pytest

import hbat.data.load
from hbat.data.load import DatasetError

NAME = "datasets['dpo']"
ROWS = [{"text": "one"}, {"text": "two"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(source, *, name):
    return hbat.data.load.load(source if isinstance(source, dict) else {"path": source}, name=name)


def write(path, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return str(path)


def refusal(source):
    with pytest.raises(DatasetError) as caught:
        load(source, name=NAME)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return message


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_lines_of_json_are_read(folder, file):
    assert load(write(folder / file), name=NAME).to_list() == ROWS


def test_a_list_in_json_is_read(folder):
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert load("a.json", name=NAME).to_list() == ROWS


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read(folder, suffix):
    getattr(datasets.Dataset.from_list(ROWS), f"to_{suffix}")(f"a.{suffix}")
    assert load(f"a.{suffix}", name=NAME).to_list() == ROWS


def test_several_files_follow_each_other_in_order(folder):
    first, second = write(folder / "b.jsonl", [{"text": "b"}]), write(folder / "a.jsonl.gz", [{"text": "a"}])
    assert load([first, second], name=NAME)["text"][:] == ["b", "a"]
    assert load({"path": [first, second]}, name=NAME)["text"][:] == ["b", "a"]
    assert load({"path": "json", "data_files": [first, second]}, name=NAME)["text"][:] == ["b", "a"]


def test_a_split_of_a_file_is_taken(folder):
    assert len(load({"path": write(folder / "a.jsonl"), "split": "train[:1]"}, name=NAME)) == 1


def test_a_folder_is_read(folder):
    (folder / "data").mkdir()
    write(folder / "data" / "train.jsonl")
    assert load("data", name=NAME).to_list() == ROWS


def test_a_saved_data_set_is_read(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    assert load("saved", name=NAME).to_list() == ROWS


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "a {1}#%20(ü).jsonl"])
def test_a_name_with_signs_of_a_pattern_is_that_of_one_file(folder, name):
    write(folder / "a1.jsonl", [{"text": "another"}])
    write(folder / name, [{"text": "this one"}])
    assert load(name, name=NAME)["text"][:] == ["this one"]


def test_a_name_that_the_reader_takes_for_a_chain_is_refused(folder):
    write(folder / "a::b.jsonl")
    assert "has `::` in its name" in refusal("a::b.jsonl")


@pytest.mark.parametrize("file", ["pairs.jsonl", "pairs.parquet"])
def test_a_missing_file_is_named_with_the_nearest_in_its_folder(folder, file):
    write(folder / f"pairs-1.{file.partition('.')[2]}")
    assert f"there is no file {file}. Did you mean `pairs-1.{file.partition('.')[2]}`?" in refusal(file)


def test_a_missing_folder_is_named():
    assert "there is no file none/a.jsonl (and no directory none)." in refusal("none/a.jsonl")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2,}\n', "it is not valid JSON: "),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "(line 2 column"),
        ("a.jsonl", b'{"a": [\n', "(line 1 column 8)"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "(line 2 column 6)"),
        ("a.jsonl", b'{"a": 1}\n3\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"a": 1}\nnull\n', "line 2 is `null`, not a JSON object"),
        ("a.jsonl", b"null\n", "line 1 is `null`, not a JSON object"),
        ("a.jsonl.gz", gzip.compress(b"null\n", mtime=0), "line 1 is `null`, not a JSON object"),
        ("a.jsonl", b"\xef\xbb\xbfnull\n", "line 1 is `null`, not a JSON object"),  # with a byte order mark
        ("a.json", b'\xef\xbb\xbf[null, {"a": 1}]', "row 0 of its list is not a JSON object"),
        ("a.json", b'[{"a": 1}, null]', "row 1 of its list is not a JSON object"),
        ("a.json", b"[null]", "row 0 of its list is not a JSON object"),
        ("a.json", b'[{"a": 1}, 3]', "row 1 of its list is not a JSON object"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b"{}\n{}\n", "its rows have no columns"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("a.jsonl", b"\xff\xfe{}", "can't decode byte 0xff"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "hello"}\n' * 500, mtime=0)[:-30], "the compressed file is truncated"),
        ("a.jsonl.gz", b'{"a": 1}\n', "Not a gzipped file"),
        ("a.parquet", b"abc", "Parquet file size is 3 bytes"),
        ("a.csv", b"", "the file is empty"),
        ("a.txt", b"abc", "has an unsupported extension; expected .jsonl, .json, .csv, .parquet"),
    ],
)
def test_an_unreadable_file_is_named_with_its_problem(folder, file, content, problem):
    (folder / file).write_bytes(content)
    message = refusal(file)
    assert file in message
    assert problem in message


def test_files_with_other_types_in_a_column_are_named(folder):
    message = refusal([write(folder / "a.jsonl"), write(folder / "b.jsonl", [{"text": [{"a": 1}]}])])
    assert "a.jsonl" in message
    assert "b.jsonl do not have the same columns" in message


@pytest.mark.parametrize("source", ["someone/something", {"path": "something", "split": "train"}])
def test_a_hub_that_cannot_be_reached_is_one_line(source):
    assert "the Hugging Face Hub cannot be reached" in refusal(source)


@pytest.mark.parametrize("source", ["no such thing", "a/b/c"])
def test_what_is_neither_a_file_nor_a_name_is_refused(source):
    assert "neither an existing file nor a name on the Hugging Face Hub" in refusal(source)


def test_a_hub_name_goes_to_the_hub_with_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or "loaded")
    assert load("someone/something", name=NAME) == "loaded"
    source = {"path": "someone/something", "name": "v2", "split": "test", "revision": "abc", "data_files": "x.jsonl"}
    assert load(source, name=NAME) == "loaded"
    assert calls == [
        (("someone/something", None), {"split": "train"}),
        (("someone/something", "v2"), {"split": "test", "revision": "abc", "data_files": "x.jsonl"}),
    ]


def test_a_split_that_is_not_there_is_named(folder):
    message = refusal({"path": write(folder / "a.jsonl"), "split": "tast"})
    assert 'Unknown split "tast"' in message


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "has no `path`"),
        ("", "has no `path`"),
        ([], "has no `path`; expected a name on the Hugging Face Hub, a file or a list of files"),
        ({}, "has no `path`"),
        ({"split": "train"}, "has no `path`"),
        ({"path": "a.jsonl", "revision": "main"}, "`revision` does not apply to the file a.jsonl"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(source, problem):
    assert problem in refusal(source)
