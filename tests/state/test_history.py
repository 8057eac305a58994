"""Which states stay on disk, whatever happens while they are written."""

import itertools
import shutil

import pytest
import torch
from faults import DAMAGES, WRITE_OPERATIONS, Crash, at_every_operation, full_disk

from hbat.state.files import StorageError
from hbat.state.folder import RunFolder
from hbat.state.history import KeptStates
from hbat.state.manifest import STATE_FILE, RunState, RunStateError

KINDS = ("weights", "importance-sft")
every_limit = pytest.mark.parametrize("limit", [1, 2, 3])


pytestmark = pytest.mark.usefixtures("fast_disk")


def tensors(number):
    return {"a": torch.full((3,), float(number))}


def boundary(folder, state, number):
    """Put the state before stage `number` on disk as a run does. `initial` and every second importance stay."""
    folder.write_tensors(state, "weights", number, tensors(number))
    if number == 0:
        state.files["initial"] = state.files["weights"]
    if number % 2 == 0:
        folder.write_tensors(state, "importance-sft", number, tensors(number))
    state.next_stage = number
    folder.commit(state)


def evaluated(folder, state):
    state.evaluations = [*state.evaluations, {"stage": state.next_stage}]
    folder.commit(state)


def run(path, limit, numbers):
    folder, state = RunFolder(path, keeps=limit), RunState(fingerprint={})
    for number in numbers:
        boundary(folder, state, number)
        evaluated(folder, state)


def complete(path):
    """Read the newest complete state and check all that it names; returns it with its folder."""
    folder = RunFolder(path)
    state = folder.read()
    if state is not None:
        assert folder.read_tensors(state, "weights")["a"].tolist() == [state.next_stage] * 3
        assert folder.read_tensors(state, "initial")["a"].tolist() == [0] * 3
        assert folder.read_tensors(state, "importance-sft")["a"].tolist() == [state.next_stage // 2 * 2] * 3
    return folder, state


def names(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@every_limit
def test_as_many_states_are_kept_as_asked_for_and_none_of_them_shares_its_fate(limit, tmp_path):
    run(tmp_path, limit, range(6))
    manifests = [STATE_FILE, "hbat_state.previous.json", "hbat_state.previous-2.json"][:limit]
    assert sorted(file.name for file in tmp_path.glob("*.json")) == sorted(manifests)
    weights = {"weights-000.safetensors", *(f"weights-00{5 - age}.safetensors" for age in range(limit))}
    assert {file.name for file in (tmp_path / "state").glob("weights-*")} == weights
    for age in range(limit):
        assert complete(tmp_path)[1].next_stage == 5 - age
        KeptStates(tmp_path, limit).manifest(age).unlink()
    with pytest.raises(RunStateError) if limit > 1 else pytest.raises(RunStateError, match="another run"):
        assert complete(tmp_path)[1] is None
        RunFolder(tmp_path).require_unused()


def test_a_state_before_the_same_stage_is_replaced_and_takes_no_older_ones_place(tmp_path):
    run(tmp_path, 2, range(3))
    assert complete(tmp_path)[1].evaluations == [{"stage": 0}, {"stage": 1}, {"stage": 2}]
    (tmp_path / STATE_FILE).unlink()
    state = complete(tmp_path)[1]
    assert (state.next_stage, state.evaluations) == (1, [{"stage": 0}, {"stage": 1}])


def test_a_lower_limit_takes_effect_at_the_next_commit_and_a_higher_one_as_states_come(tmp_path):
    run(tmp_path, 3, range(4))
    folder = RunFolder(tmp_path, keeps=1)
    boundary(folder, folder.read(), 4)
    assert [name for name in names(tmp_path) if name.endswith("json")] == [STATE_FILE]
    folder = RunFolder(tmp_path, keeps=3)
    state = folder.read()
    for number in (5, 6):
        boundary(folder, state, number)
    assert len([name for name in names(tmp_path) if name.endswith("json")]) == 3


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_older_manifest_that_is_damaged_is_of_no_matter_until_it_is_needed(damage, tmp_path):
    run(tmp_path, 2, range(3))
    damage(tmp_path / "hbat_state.previous.json")
    folder, state = complete(tmp_path)
    boundary(folder, state, 3)
    (tmp_path / STATE_FILE).unlink()
    assert complete(tmp_path)[1].next_stage == 2


def test_a_damaged_state_takes_no_older_ones_place(tmp_path):
    """Three states, of which the newest two are damaged one after the other."""
    run(tmp_path, 3, range(5))
    for newest in (4, 3):
        (tmp_path / "state" / f"weights-00{newest}.safetensors").write_bytes(b"rot")
    folder, state = complete(tmp_path)
    assert state.next_stage == 2
    boundary(RunFolder(tmp_path, keeps=3), folder.read(), 3)  # a folder that was not read has no older ones to keep
    assert complete(tmp_path)[1].next_stage == 3


# --- a crash or a full disk at any moment ----------------------------------------------------------------------------


#: Stage, moment and limit of what `make test` runs; the others take as long and are alike.
UNMARKED = {(0, "before", 2), (2, "after", 2), (3, "before", 1), (3, "after", 3)}


@pytest.mark.parametrize(
    ("stage", "moment", "limit"),
    [
        pytest.param(*case, marks=() if case in UNMARKED else pytest.mark.slow)
        for case in itertools.product(range(4), ("before", "after"), (1, 2, 3))
    ],
)
def test_a_crash_at_any_file_operation_leaves_a_complete_state(stage, moment, limit, tmp_path):
    run(tmp_path / "start", limit, range(stage))
    run(tmp_path / "whole", limit, range(5))

    def action(number, arm):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", path) if stage else path.mkdir()
        folder = RunFolder(path, keeps=limit)
        state = folder.read() or RunState(fingerprint={})
        arm()
        boundary(folder, state, stage)
        evaluated(folder, state)

    seen = []
    for number, error in at_every_operation(action, moment=moment):
        assert isinstance(error, Crash)
        path = tmp_path / str(number)
        state = complete(path)[1]
        assert state is not None or stage == 0
        seen.append((state.next_stage, len(state.evaluations)) if state else (-1, 0))
        folder = RunFolder(path, keeps=limit)
        state = folder.read() or RunState(fingerprint={})
        if len(state.evaluations) <= state.next_stage and state.files:
            evaluated(folder, state)
        for again in range(state.next_stage + bool(state.files), 5):
            boundary(folder, state, again)
            evaluated(folder, state)
        assert {name: (path / name).read_bytes() for name in names(path)} == {
            name: (tmp_path / "whole" / name).read_bytes() for name in names(tmp_path / "whole")
        }
    assert seen == sorted(seen)  # one commit point each
    assert set(seen) == {(stage - 1, stage), (stage, stage), (stage, stage + 1)}
    assert len(seen) >= 10


@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize(
    "damaged", [STATE_FILE, "state/weights-003.safetensors", "state/importance-sft-002.safetensors"]
)
def test_a_crash_after_a_fall_back_leaves_a_complete_state(damaged, limit, tmp_path):
    """`importance-sft-002` belongs to the states before stages 2 and 3, so that two states are lost with it."""
    run(tmp_path / "start", limit, range(4))
    (tmp_path / "start" / damaged).write_bytes(b"rot")
    oldest = {"state/importance-sft-002.safetensors": 1}.get(damaged, 2)
    if 3 - oldest >= limit:
        with pytest.raises(RunStateError, match=r"importance-sft-002\.safetensors has 3 bytes"):
            complete(tmp_path / "start")
        return

    def action(number, arm):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", path)
        folder = RunFolder(path, keeps=limit)
        state = folder.read()
        assert state.next_stage == oldest
        arm()
        for again in range(oldest + 1, 4):
            boundary(folder, state, again)
            evaluated(folder, state)

    # Not in order: a file that is written again, to the same bytes, can make the damaged state whole before its time.
    seen = {complete(tmp_path / str(number))[1].next_stage for number, _ in at_every_operation(action, moment="after")}
    assert seen == {*range(oldest, 4)}


@every_limit
def test_a_full_disk_at_any_write_leaves_the_last_state_and_no_rubbish(limit, tmp_path):
    run(tmp_path / "start", limit, range(3))

    def action(number, arm):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", path)
        folder = RunFolder(path, keeps=limit)
        state = folder.read()
        arm()
        boundary(folder, state, 3)

    count = 0
    for number, error in at_every_operation(action, raises=full_disk, only=WRITE_OPERATIONS):
        count += 1
        path = tmp_path / str(number)
        assert isinstance(error, StorageError)
        assert f"{path}/" in str(error)
        assert not list(path.rglob("*.tmp"))
        folder, state = complete(path)
        assert state.next_stage in {2, 3}
        boundary(folder, state, 3)
        assert complete(path)[1].next_stage == 3
    assert count >= 8


def test_what_cannot_be_removed_is_named_and_stops_no_run(tmp_path, caplog):
    run(tmp_path / "start", 1, range(2))

    def action(number, arm):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", path)
        folder = RunFolder(path, keeps=1)
        state = folder.read()
        arm()
        boundary(folder, state, 2)

    assert list(at_every_operation(action, raises=PermissionError, only=("unlink",))) == []
    assert "is no longer needed, but cannot be removed" in caplog.records[0].getMessage()
