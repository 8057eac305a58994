"""Files that are there whole or not at all, and disks that are full or may not be written to."""

import contextlib
import errno
import json
import os
import pathlib
import subprocess

import pytest
import safetensors.torch
import torch
from disks import files_of_at_most, mounted
from faults import WRITE_OPERATIONS, Crash, Faults, at_every_operation, full_disk

from hbat.state.files import StorageError, cannot_write, storage_errors, write_bytes, write_json, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}


def write_all(folder, number):
    write_json(folder / "a.json", {"number": number})
    write_bytes(folder / "b.bin", bytes([number]) * 50)
    write_tensors(folder / "c.safetensors", {"c": torch.full((9,), number)})


def read_all(folder):
    found = []
    with contextlib.suppress(FileNotFoundError):
        found.append(json.loads((folder / "a.json").read_text())["number"])
        found.append((folder / "b.bin").read_bytes())
        found.append(safetensors.torch.load_file(folder / "c.safetensors")["c"].tolist())
    return found


EXPECTED = [[number, bytes([number]) * 50, [number] * 9] for number in (1, 2)]


def test_what_was_written_is_there(tmp_path):
    write_tensors(tmp_path / "new" / "folder" / "w.safetensors", TENSORS)
    read = safetensors.torch.load_file(tmp_path / "new" / "folder" / "w.safetensors")
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert read.keys() == TENSORS.keys()


def test_trainable_parameters_are_written_without_their_graph(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"w": torch.nn.Parameter(torch.ones(2))})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w.safetensors")["w"], torch.ones(2))


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, pathlib.Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(pathlib.Path, "replace", lambda *args: (order.append("rename"), replace(*args))[1])
    write_json(tmp_path / "a.json", {})
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert order == ["sync", "rename", "sync"] * 2


def test_values_that_json_cannot_hold_leave_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"value": 2, "other": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_that_dies_leaves_each_file_old_or_new(moment, tmp_path):
    def action(number, arm):
        write_all(tmp_path / str(number), 1)
        arm()
        write_all(tmp_path / str(number), 2)

    number = 0
    for number, error in at_every_operation(action, moment=moment):
        assert isinstance(error, Crash)
        found = read_all(tmp_path / str(number))
        assert all(each in old_and_new for each, *old_and_new in zip(found, *EXPECTED, strict=True))
        write_all(tmp_path / str(number), 2)
        assert read_all(tmp_path / str(number)) == EXPECTED[1]
        assert len(list((tmp_path / str(number)).iterdir())) == 3
    assert number >= 3 * 4


# --- disks that do not take it ---------------------------------------------------------------------------------------


def test_a_full_disk_at_any_write_is_named_and_leaves_the_old_file(tmp_path):
    def action(number, arm):
        write_all(tmp_path / str(number), 1)
        arm()
        write_all(tmp_path / str(number), 2)

    failures = 0
    for number, error in at_every_operation(action, raises=full_disk, only=WRITE_OPERATIONS):
        folder, failures = tmp_path / str(number), failures + 1
        assert isinstance(error, StorageError)
        assert error.errno == errno.ENOSPC
        message = str(error)
        assert message.startswith(f"{folder}/")
        assert "cannot be written, with " in message
        assert "No space left on device. What was on disk before is untouched; resume with `resume" in message
        assert len(read_all(folder)) == 3
        assert not list(folder.glob("*.tmp"))
    assert failures >= 12


def test_the_room_that_a_file_needs_is_named(tmp_path, monkeypatch):
    Faults(monkeypatch, at=1, raises=full_disk, only=("write",))
    with pytest.raises(
        StorageError, match=r"w\.safetensors \(4\.0 MB\) cannot be written, with [\d.]+ [GMk]B free there"
    ):
        write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "shown"), [(999, "999 bytes"), (1000, "1.0 kB"), (25 * 10**5, "2.5 MB"), (3 * 10**11, "300.0 GB")]
)
def test_sizes_are_readable(size, shown, tmp_path):
    assert f"file ({shown}) cannot" in str(cannot_write(tmp_path / "file", size, OSError(errno.EACCES, "denied")))


def test_an_error_that_says_no_more_than_its_text_is_passed_on(tmp_path):
    assert ": it broke. What was" in str(cannot_write(tmp_path / "file", 1, RuntimeError("it broke")))


def test_a_disk_that_is_really_full_keeps_the_old_file(tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k") as folder:
        write_tensors(folder / "w.safetensors", {"w": torch.ones(10_000)})
        for write in (
            lambda: write_tensors(folder / "w.safetensors", {"w": torch.zeros(1_000_000)}),
            lambda: write_bytes(folder / "w.safetensors", bytes(4_000_000)),
        ):
            with pytest.raises(
                StorageError, match=r"w\.safetensors \(4\.0 MB\) .* kB free there: No space left"
            ) as error:
                write()
            assert error.value.errno == errno.ENOSPC
        assert torch.equal(safetensors.torch.load_file(folder / "w.safetensors")["w"], torch.ones(10_000))
        assert [each.name for each in folder.iterdir()] == ["w.safetensors"]
        write_tensors(folder / "w.safetensors", {"w": torch.zeros(20_000)})


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    write_json(tmp_path / "source" / "a.json", {"value": 1})
    with mounted(tmp_path / "bound", "--bind", source=str(tmp_path / "source")) as folder:
        done = subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting read-only is not permitted here")
        with pytest.raises(StorageError, match=r"a\.json \(\d+ bytes\) cannot be written.*: Read-only file system"):
            write_json(folder / "a.json", {"value": 2})
        with pytest.raises(StorageError, match="Read-only file system"):
            write_tensors(folder / "new" / "w.safetensors", TENSORS)
    assert json.loads((tmp_path / "source" / "a.json").read_text()) == {"value": 1}


WRITERS = {
    "torch": lambda path: torch.save(torch.zeros(50_000), path),
    "safetensors": lambda path: safetensors.torch.save_file({"a": torch.zeros(50_000)}, path),
    "python": lambda path: path.write_bytes(bytes(200_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_a_library_that_do_not_fit_are_named_by_their_folder(writer, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with (
        pytest.raises(StorageError, match=r"checkpoint cannot be written, with .* free there: .* resume with"),
        files_of_at_most(20_000),
        storage_errors(tmp_path / "checkpoint"),
    ):
        WRITERS[writer](tmp_path / "checkpoint" / "file")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), KeyError("a")]
)
def test_other_errors_of_a_library_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, storage_errors(tmp_path):
        raise error
    assert raised.value is error


def test_an_error_that_names_its_file_is_not_wrapped(tmp_path):
    own = cannot_write(tmp_path / "file", 1, OSError(errno.ENOSPC, "full"))
    with pytest.raises(StorageError) as raised, storage_errors(tmp_path):
        raise own
    assert raised.value is own
