"""Two processes train what one trains on the same global batches: weights, importance, tables and logs."""

import functools
import json

import ddp_runs
import launched
import pytest
import runs

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
QUICK = ["sft and dpo", "ppo"]
SLOW = [name for name in ddp_runs.RUNS if name not in QUICK]
each_run = launched.marked(QUICK, SLOW)


def launch(folder, mode, *names, launcher=launched.TORCHRUN):
    cpu = {"ACCELERATE_USE_CPU": "true"}
    return launched.launch(ddp_runs, folder, mode, *names, launcher=launcher, environment=cpu)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of a run in two processes; the runs of a group share one start of the processes."""

    @functools.cache
    def train(mode, *group):
        folder = tmp_path_factory.mktemp("two")
        launched.succeeded(launch(folder, mode, *group))
        return folder

    return lambda name: train("train", *QUICK) if name in QUICK else train("train and stop", *SLOW)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    launched.assert_weights_of_one(name, two(name), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(name, two, one):
    launched.assert_numbers_of_one(name, two(name), one(name), losses=not launched.BEFORE_5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_resume_to_the_last_bit(two):
    launched.assert_same_run("sft and dpo", two(SLOW[0]) / "stopped", two("sft and dpo"), began_at=[0, 0, 0, 0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft and dpo", "ppo"])
def test_two_processes_that_were_killed_resume_to_the_last_bit(name, two, tmp_path):
    killed = launch(tmp_path, "kill", name)
    assert killed.returncode != 0
    run = launched.place_of(tmp_path, name) / "run"
    assert list(run.glob("stage-003-*/checkpoint-*")), killed.stderr[-2000:]
    launched.succeeded(launch(tmp_path, "resume", name))
    assert runs.same(launched.read(tmp_path, name)[0], launched.read(two(name), name)[0])
    assert launched.read(tmp_path, name)[1]["table"] == launched.read(two(name), name)[1]["table"]


@pytest.mark.slow
def test_two_processes_continue_a_finished_run(tmp_path):
    name = "sft and dpo"
    launched.succeeded(launch(tmp_path, "continue", name))
    one = ddp_runs.train_twice(name, tmp_path / "one")
    launched.assert_weights_of_one(name, tmp_path, one)
    launched.assert_numbers_of_one(name, tmp_path, one, losses=not launched.BEFORE_5)


@pytest.mark.slow
def test_accelerate_launch_that_is_told_to_end_saves_and_resumes(two, tmp_path):
    name = "sft and dpo"
    ended = launch(tmp_path, "end", name, launcher=launched.ACCELERATE)
    assert ended.returncode != 0
    checkpoints = (launched.place_of(tmp_path, name) / "run").glob("stage-*/checkpoint-*")
    assert [checkpoint.name for checkpoint in checkpoints] == ["checkpoint-1"], ended.stderr[-4000:]
    launched.succeeded(launch(tmp_path, "resume", name, launcher=launched.ACCELERATE))
    weights, found = launched.read(tmp_path, name)
    assert (found["processes"], found["began at"]) == (2, [1])
    assert runs.same(weights, launched.read(two(name), name)[0])


@pytest.mark.slow
def test_two_processes_skip_damaged_files_together_or_end_together(two, tmp_path):
    """Rank 0 alone looks at the files; the other one neither trains on something else nor waits forever."""
    name = "sft and dpo"
    assert launch(tmp_path, "kill", name).returncode != 0
    run = launched.place_of(tmp_path, name) / "run"
    checkpoints = sorted(run.glob("stage-003-*/checkpoint-*"))
    assert "rng_state_1.pth" in json.loads((checkpoints[-1] / "hbat_checksums.json").read_text())["files"]
    weights = run / "state" / "weights-003.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    older = next(run.glob("hbat_state.previous.json"))
    manifest = older.read_bytes()
    older.write_text("rot")
    lost = launch(tmp_path, "resume", name)
    assert lost.returncode != 0
    assert "holds no complete state of its run" in lost.stderr
    older.write_bytes(manifest)
    done = launched.succeeded(launch(tmp_path, "resume", name))
    assert "weights-003.safetensors has" in done.stderr
    assert runs.same(launched.read(tmp_path, name)[0], launched.read(two(name), name)[0])
    assert runs.same(*(launched.read(tmp_path, name, rank)[0] for rank in (0, 1)))
