import json
import os
import pathlib
import pickle
import shutil
import types

import pytest
import safetensors.torch
import torch

from hbat import run_state
from hbat.run_state import FORMAT, STATE_FILE, RunFolder, RunState, RunStateError, write_json, write_tensors

STATE = RunState(
    fingerprint={"run": {"seed": 1}},
    next_stage=3,
    global_step=17,
    objective_steps={"sft": 10, "dpo": 7},
    evaluations=[{"stage": -1, "scores": {"sft": {"loss": 0.1}}}],
)


def tensors(number):
    return {"a.weight": torch.full((2, 3), float(number)), "b": torch.tensor(number)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def commit_boundary(folder, number):
    """Put the state before stage `number` into a folder, as a run does: tensors first, then the manifest."""
    state = folder.read() or RunState(fingerprint={})
    for kind in ("weights", "importance-sft"):
        folder.write_tensors(state, kind, number, tensors(number))
    state.next_stage = number
    folder.commit(state)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Waiting for the disk takes most of the time here, and a test outlives no power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- round trip ------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest_holds_no_run(tmp_path):
    assert RunFolder(tmp_path).read() is None
    assert RunFolder(tmp_path / "not" / "there").read() is None
    (tmp_path / (STATE_FILE + ".tmp")).write_text("{")
    assert RunFolder(tmp_path).read() is None


def test_what_was_committed_is_read_back(tmp_path):
    RunFolder(tmp_path / "new" / "run").commit(STATE)
    assert RunFolder(tmp_path / "new" / "run").read() == STATE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_come_back_to_the_last_bit(dtype, tmp_path):
    folder, state = RunFolder(tmp_path), RunState(fingerprint={})
    written = {
        "matrix": (torch.randn(3, 4) * 100).to(dtype),
        "turned": (torch.randn(3, 4) * 100).to(dtype).T,
        "one.number": torch.tensor(7).to(dtype),
        "spread": torch.ones(1).to(dtype).expand(4),
        "empty": torch.zeros(0, 2, dtype=dtype),
    }
    folder.write_tensors(state, "weights", 4, written)
    folder.commit(state)
    read = RunFolder(tmp_path).read_tensors(RunFolder(tmp_path).read(), "weights")
    assert same(read, written)
    assert all(read[name].dtype == dtype for name in written)
    assert state.files == {"weights": "weights-004.safetensors"}


def test_trainable_parameters_are_written_without_their_graph(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"w": torch.nn.Parameter(torch.ones(2))})
    assert same(safetensors.torch.load_file(tmp_path / "w.safetensors"), {"w": torch.ones(2)})


def test_a_kind_that_was_never_written_is_empty(tmp_path):
    assert RunFolder(tmp_path).read_tensors(RunState(fingerprint={}), "importance-sft") == {}


def test_the_manifest_is_readable_json(tmp_path):
    RunFolder(tmp_path).commit(STATE)
    text = (tmp_path / STATE_FILE).read_text(encoding="utf-8")
    assert json.loads(text)["format"] == FORMAT
    assert text.endswith("}\n")


# --- what is removed -------------------------------------------------------------------------------------------------


def test_a_commit_removes_the_files_that_it_does_not_name_and_only_those(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "state" / "a-folder").mkdir(parents=True)
    (tmp_path / "state" / "weights-009.safetensors").touch()
    (tmp_path / "state" / "weights-001.safetensors.tmp").touch()
    (tmp_path / "model.safetensors").touch()
    commit_boundary(folder, 1)
    kept = [STATE_FILE, "model.safetensors", "state/importance-sft-001.safetensors", "state/weights-001.safetensors"]
    assert files(tmp_path) == kept
    assert (tmp_path / "state" / "a-folder").is_dir()
    commit_boundary(folder, 2)
    assert files(tmp_path) == [each.replace("001", "002") for each in kept]


def test_two_kinds_may_name_one_file(tmp_path):
    folder, state = RunFolder(tmp_path), RunState(fingerprint={})
    folder.write_tensors(state, "weights", 0, tensors(0))
    state.files["initial"] = state.files["weights"]
    folder.commit(state)
    folder.write_tensors(state, "weights", 1, tensors(1))
    folder.commit(state)
    assert same(folder.read_tensors(folder.read(), "initial"), tensors(0))
    assert same(folder.read_tensors(folder.read(), "weights"), tensors(1))


def test_the_folder_of_a_stage_goes_whether_or_not_it_is_there(tmp_path):
    (tmp_path / "stage-000-sft" / "checkpoint-2").mkdir(parents=True)
    RunFolder(tmp_path).remove_stage("stage-000-sft")
    RunFolder(tmp_path).remove_stage("stage-000-sft")
    assert not list(tmp_path.iterdir())


def test_a_process_that_only_reads_changes_nothing_on_disk(tmp_path):
    commit_boundary(RunFolder(tmp_path), 1)
    (tmp_path / "state" / "garbage").touch()
    (tmp_path / "stage-001-dpo").mkdir()
    before = {each: (tmp_path / each).stat().st_mtime_ns for each in files(tmp_path)}
    reader = RunFolder(tmp_path, writes=False)
    state = reader.read()
    reader.write_tensors(state, "weights", 2, tensors(2))
    reader.commit(state)
    reader.remove_stage("stage-001-dpo")
    assert {each: (tmp_path / each).stat().st_mtime_ns for each in files(tmp_path)} == before
    assert (tmp_path / "stage-001-dpo").is_dir()
    assert state.files["weights"] == "weights-002.safetensors"  # it still follows where the run stands
    RunFolder(tmp_path / "other", writes=False).commit(state)
    assert not (tmp_path / "other").exists()


# --- broken files ----------------------------------------------------------------------------------------------------

WHOLE = {"format": FORMAT, "fingerprint": {}}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "3", '"text"', "[]", "[1, 2]", "{}", '{"fingerprint": {}}', json.dumps({"format": FORMAT}),
        json.dumps(WHOLE | {"unknown": 1}), json.dumps(WHOLE | {"files": 3}), json.dumps(WHOLE | {"next_stage": "1"}),
        json.dumps(WHOLE | {"next_stage": True}), json.dumps(WHOLE | {"evaluations": {}}), "\ufeff{}", "\x00",
    ],
)  # fmt: skip
def test_a_broken_manifest_is_named_with_what_to_do(text, tmp_path):
    (tmp_path / STATE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(RunStateError, match=rf"{STATE_FILE} cannot be read \(.+\)\. Restore it from a backup"):
        RunFolder(tmp_path).read()


def test_a_manifest_that_is_no_text_is_named(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(RunStateError, match=rf"{STATE_FILE} cannot be read"):
        RunFolder(tmp_path).read()


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None])
def test_a_manifest_of_another_format_is_named(found, tmp_path):
    (tmp_path / STATE_FILE).write_text(json.dumps(WHOLE | {"format": found}))
    with pytest.raises(RunStateError, match=rf"{STATE_FILE} has format {found!r}; this version of hbat reads format"):
        RunFolder(tmp_path).read()


def _remove(file):
    file.unlink()


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def _empty(file):
    file.write_bytes(b"")


def _lie_about_length(file):
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def _replace_by_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [_remove, _truncate, _empty, _lie_about_length, _replace_by_folder])
def test_a_missing_or_damaged_tensor_file_is_named(damage, tmp_path):
    folder = RunFolder(tmp_path)
    commit_boundary(folder, 1)
    damage(tmp_path / "state" / "weights-001.safetensors")
    with pytest.raises(RunStateError, match=r"weights-001\.safetensors cannot be read \(.+\)\. The run cannot go on"):
        folder.read_tensors(folder.read(), "weights")
    assert same(folder.read_tensors(folder.read(), "importance-sft"), tensors(1))


class _Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_in_place_of_tensors_is_never_executed(write, tmp_path):
    folder = RunFolder(tmp_path)
    commit_boundary(folder, 1)
    mark = tmp_path / "executed"
    with (tmp_path / "state" / "weights-001.safetensors").open("wb") as file:
        write(_Bomb(mark), file)
    with pytest.raises(RunStateError, match="cannot be read"):
        folder.read_tensors(folder.read(), "weights")
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Bomb(mark)))  # noqa: S301 - proves that the planted bytes are live
    assert mark.exists()


# --- a crash at any moment -------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, so that nothing in between can swallow it: a process that dies."""


class FileOperations:
    """Counts what changes files and dies before or after the n-th of them; a write dies half way through."""

    def __init__(self, monkeypatch, *, at, moment):
        self.count, self._at, self._moment = 0, at, moment
        for owner, name in [
            (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (os, "fsync"), (shutil, "rmtree"),
        ]:  # fmt: skip
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        monkeypatch.setattr(run_state, "save_file", self._counted(run_state.save_file, self._half_of_tensors))
        json_module = types.SimpleNamespace(**vars(json))
        json_module.dump = self._counted(json.dump, self._half_of_json)
        monkeypatch.setattr(run_state, "json", json_module)

    def _counted(self, operation, half=None):
        def call(*args, **kwargs):
            self.count += 1
            dies = self.count == self._at
            if dies and self._moment == "before":
                if half:
                    half(operation, *args, **kwargs)
                raise Crash
            result = operation(*args, **kwargs)
            if dies:
                raise Crash
            return result

        return call

    @staticmethod
    def _half_of_tensors(operation, values, file):
        operation(values, file)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])

    @staticmethod
    def _half_of_json(operation, values, file, **kwargs):
        text = json.dumps(values, **kwargs)
        file.write(text[: len(text) // 2])
        file.flush()


def _operations_of_a_boundary(tmp_path):
    folder = RunFolder(tmp_path / "counted")
    commit_boundary(folder, 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        operations = FileOperations(monkeypatch, at=0, moment="never")
        commit_boundary(folder, 2)
    return operations.count


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_any_two_file_operations_leaves_the_last_state_or_the_next(moment, tmp_path):
    total, seen = _operations_of_a_boundary(tmp_path), []
    assert total >= 14  # 2 x (write, 2 syncs, rename), the manifest's 4, and two old files removed
    for at in range(1, total + 1):
        folder = RunFolder(tmp_path / f"{moment}-{at}")
        commit_boundary(folder, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            FileOperations(monkeypatch, at=at, moment=moment)
            with pytest.raises(Crash):
                commit_boundary(folder, 2)
        state = RunFolder(folder.path).read()
        assert state.next_stage in {1, 2}
        for kind in ("weights", "importance-sft"):
            assert same(folder.read_tensors(state, kind), tensors(state.next_stage))
        seen.append(state.next_stage)
        commit_boundary(folder, 2)  # the run goes on, over whatever lies there
        assert files(folder.path) == files(tmp_path / "counted")
        assert same(folder.read_tensors(folder.read(), "weights"), tensors(2))
    assert seen == sorted(seen)  # one commit point
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_before_the_first_commit_leaves_no_run_or_a_whole_one(moment, tmp_path):
    for at in range(1, 13):
        folder = RunFolder(tmp_path / str(at))
        with pytest.MonkeyPatch.context() as monkeypatch:
            FileOperations(monkeypatch, at=at, moment=moment)
            with pytest.raises(Crash):
                commit_boundary(folder, 1)
        state = folder.read()
        assert state is None or same(folder.read_tensors(state, "weights"), tensors(1))


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
