import pytest
import torch
from faults import every_damage

from hbat.state import folder as run_state
from hbat.state.files import checksum
from hbat.state.folder import RunFolder
from hbat.state.manifest import STATE_FILE, DamagedStateError, RunState, RunStateError

STATE = RunState(
    fingerprint={"run": {"seed": 1}},
    next_stage=3,
    global_step=17,
    objective_steps={"sft": 10, "dpo": 7},
    evaluations=[{"stage": -1, "scores": {"sft": {"loss": 0.1}}}],
    log={"entries": 4, "checksum": "abc"},
    changes=[{"stage": 1, "changes": ["sft.learning_rate: 1 -> 2"]}],
)


def tensors(number):
    return {"a.weight": torch.full((2, 3), float(number)), "b": torch.tensor(number)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def commit_boundary(folder, number):
    """Put the state before stage `number` into a folder, as a run does: tensors first, then the manifest."""
    state = folder.read() or RunState(fingerprint={})
    for kind in ("weights", "importance-sft"):
        folder.write_tensors(state, kind, number, tensors(number))
    state.next_stage = number
    folder.commit(state)


pytestmark = pytest.mark.usefixtures("fast_disk")


# --- round trip ------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest_holds_no_run(tmp_path):
    assert RunFolder(tmp_path).read() is None
    assert RunFolder(tmp_path / "not" / "there").read() is None
    (tmp_path / (STATE_FILE + ".tmp")).write_text("{")
    assert RunFolder(tmp_path).read() is None
    assert not RunFolder(tmp_path).holds_run()


def test_what_was_committed_is_read_back(tmp_path):
    RunFolder(tmp_path / "new" / "run").commit(STATE)
    assert RunFolder(tmp_path / "new" / "run").read() == STATE
    assert RunFolder(tmp_path / "new" / "run").holds_run()


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


def test_a_kind_that_was_never_written_is_empty(tmp_path):
    assert RunFolder(tmp_path).read_tensors(RunState(fingerprint={}), "importance-sft") == {}


# --- what is removed -------------------------------------------------------------------------------------------------


def test_a_commit_removes_the_files_that_no_kept_state_names_and_only_those(tmp_path):
    folder = RunFolder(tmp_path, keeps=1)
    (tmp_path / "state" / "a-folder").mkdir(parents=True)
    (tmp_path / "state" / "weights-009.safetensors").touch()
    (tmp_path / "state" / "weights-001.safetensors.tmp").touch()
    (tmp_path / "model.safetensors").touch()
    commit_boundary(folder, 1)
    kept = [STATE_FILE, "model.safetensors", "state/importance-sft-001.safetensors", "state/weights-001.safetensors"]
    assert files(tmp_path) == kept
    assert (tmp_path / "state" / "a-folder").is_dir()
    commit_boundary(folder, 2)
    assert files(tmp_path) == [name.replace("001", "002") for name in kept]


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


def test_folders_of_other_stages_go_and_those_of_the_user_stay(tmp_path):
    for name in ("stage-000-sft", "stage-002-sft", "stage-003-my-dpo", "stage-1000-sft", "stage-notes", "other"):
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
    RunFolder(tmp_path, writes=False).remove_stages_but(2)
    assert len(list(tmp_path.iterdir())) == 6
    RunFolder(tmp_path).remove_stages_but(2)
    assert {path.name for path in tmp_path.iterdir()} == {"stage-002-sft", "stage-notes", "other"}
    RunFolder(tmp_path).remove_stages_but(None)
    assert {path.name for path in tmp_path.iterdir()} == {"stage-notes", "other"}


@pytest.mark.parametrize(
    "left", ["stage-001-dpo/checkpoint-2", "state/weights-001.safetensors", "state/kept-a-000.safetensors"]
)
def test_what_is_left_of_a_run_whose_manifest_is_gone_is_not_trained_over(left, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights-000.safetensors").touch()  # of a run that was cut off before its first commit
    (tmp_path / "state" / "weights-000.safetensors.tmp").touch()
    RunFolder(tmp_path).require_unused()
    (tmp_path / left).mkdir(parents=True)
    shown = left.removesuffix("/checkpoint-2")
    with pytest.raises(RunStateError, match=rf"holds '{shown}' of another run, but no {STATE_FILE}\. Remove what"):
        RunFolder(tmp_path).require_unused()


def test_a_process_that_only_reads_changes_nothing_on_disk(tmp_path):
    commit_boundary(RunFolder(tmp_path), 1)
    (tmp_path / "state" / "garbage").touch()
    (tmp_path / "stage-001-dpo").mkdir()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    reader = RunFolder(tmp_path, writes=False)
    state = reader.read()
    reader.write_tensors(state, "weights", 2, tensors(2))
    reader.commit(state)
    reader.remove_stage("stage-001-dpo")
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before
    assert (tmp_path / "stage-001-dpo").is_dir()
    assert state.files["weights"] == "weights-002.safetensors"  # it still follows where the run stands
    RunFolder(tmp_path / "other", writes=False).commit(state)
    assert not (tmp_path / "other").exists()


# --- damage ----------------------------------------------------------------------------------------------------------


@every_damage
def test_a_damaged_tensor_file_is_named(damage, tmp_path):
    folder = RunFolder(tmp_path)
    commit_boundary(folder, 1)
    state = folder.read()
    file = tmp_path / "state" / "weights-001.safetensors"
    folder.read_tensors(state, "weights")
    damage(file)
    with pytest.raises(DamagedStateError, match=r"state/weights-001\.safetensors (is|has|cannot) .+\."):
        folder.read_tensors(state, "weights")
    assert same(folder.read_tensors(state, "importance-sft"), tensors(1))
    with pytest.raises(
        RunStateError, match=r"holds no complete state .*weights-001\.safetensors .* from a backup, or"
    ):
        RunFolder(tmp_path).read()


def test_a_file_is_checked_each_time_that_it_is_read(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    commit_boundary(folder, 1)
    checked = []
    measure = run_state.fault
    monkeypatch.setattr(
        run_state, "fault", lambda file, expected: (checked.append(file.name), measure(file, expected))[1]
    )
    state = folder.read()
    assert sorted(checked) == ["importance-sft-001.safetensors", "weights-001.safetensors"]
    folder.read_tensors(state, "weights")
    assert len(checked) == 2  # a moment ago
    folder.read_tensors(state, "weights")
    assert len(checked) == 3


def test_a_whole_file_that_holds_no_tensors_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    commit_boundary(folder, 1)
    state = folder.read()
    file = tmp_path / "state" / "weights-001.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little"))
    state.checksums[file.name] = checksum(file)
    with pytest.raises(DamagedStateError, match=r"weights-001\.safetensors cannot be read \(.+\)\."):
        folder.read_tensors(state, "weights")


def test_a_process_that_did_not_write_a_file_reads_what_the_main_one_wrote(tmp_path):
    writer, reader = RunFolder(tmp_path), RunFolder(tmp_path, writes=False)
    mine, theirs = RunState(fingerprint={}), RunState(fingerprint={})
    for folder, state in ((writer, mine), (reader, theirs)):
        folder.write_tensors(state, "weights", 1, tensors(1))
        folder.commit(state)
    assert same(reader.read_tensors(theirs, "weights"), tensors(1))


@every_damage
@pytest.mark.parametrize("name", [STATE_FILE, "state/weights-002.safetensors", "state/importance-sft-002.safetensors"])
def test_a_run_goes_on_from_the_stage_before_where_the_newest_state_is_damaged(name, damage, tmp_path, caplog):
    for number in (0, 1, 2):
        commit_boundary(RunFolder(tmp_path), number)
    damage(tmp_path / name)
    folder = RunFolder(tmp_path)
    state = folder.read()
    assert state.next_stage == 1
    for kind in ("weights", "importance-sft"):
        assert same(folder.read_tensors(state, kind), tensors(1))
    (warning,) = caplog.records
    assert f"{tmp_path / name} " in warning.getMessage()
    assert "is resumed from its last complete state, at the start of stage 1; what came after" in warning.getMessage()
    for number in (2, 3):
        commit_boundary(folder, number)
    caplog.clear()
    assert RunFolder(tmp_path).read().next_stage == 3
    assert not caplog.records
    assert files(tmp_path) == [
        "hbat_state.json",
        "hbat_state.previous.json",
        *(f"state/{kind}-{number:03d}.safetensors" for kind in ("importance-sft", "weights") for number in (2, 3)),
    ]


@every_damage
def test_with_no_complete_state_left_every_damaged_file_is_named(damage, tmp_path):
    for number in (1, 2):
        commit_boundary(RunFolder(tmp_path), number)
    damage(tmp_path / "state" / "weights-001.safetensors")
    damage(tmp_path / STATE_FILE)
    before = files(tmp_path)
    with pytest.raises(
        RunStateError, match=r"hbat_state\.json .*weights-001\.safetensors .*Restore these files from a"
    ):
        RunFolder(tmp_path).read()
    assert files(tmp_path) == before


def test_damage_of_the_initial_weights_matters_only_to_those_who_need_them(tmp_path):
    folder, state = RunFolder(tmp_path), RunState(fingerprint={})
    folder.write_tensors(state, "weights", 0, tensors(0))
    state.files["initial"] = state.files["weights"]
    folder.write_tensors(state, "weights", 1, tensors(1))
    folder.commit(state)
    (tmp_path / "state" / "weights-000.safetensors").unlink()
    again = folder.read()
    assert same(folder.read_tensors(again, "weights"), tensors(1))
    with pytest.raises(DamagedStateError, match=r"weights-000\.safetensors is missing"):
        folder.require_whole(again, "initial")
    with pytest.raises(DamagedStateError, match=r"weights-000\.safetensors is missing"):
        folder.read_tensors(again, "initial")
