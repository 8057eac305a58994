"""Two processes train what one trains on the same global batches: weights, importance, tables and logs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import ddp_runs
import pytest
import runs
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
TIMEOUT = 600  # seconds; a process that is lost leaves the other waiting


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def launch(folder, mode, *names, launcher=TORCHRUN):
    """Run two processes; `accelerate launch --cpu` would start one, silently."""
    worker = Path(ddp_runs.__file__)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ACCELERATE"))}
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(worker), str(folder), mode, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        env=environment | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


#: What `make test` runs; the others take the minutes of `make test-all`.
QUICK = ["sft and dpo", "ppo"]
SLOW = [name for name in ddp_runs.RUNS if name not in QUICK]
each_run = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of a run in two processes; the runs of a group share one start of the processes."""

    @functools.cache
    def train(group):
        folder = tmp_path_factory.mktemp("two")
        done = launch(folder, "train", *group)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return lambda name: train(tuple(QUICK if name in QUICK else SLOW))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


def read(folder, name, rank=0):
    place = folder / name.replace(" ", "-")
    return load_file(place / f"weights-{rank}.safetensors"), json.loads((place / f"result-{rank}.json").read_text())


def assert_close(first, second, tolerance, path=""):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_close(first[key], second[key], tolerance, f"{path}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for index, (left, right) in enumerate(zip(first, second, strict=True)):
            assert_close(left, right, tolerance, f"{path}[{index}]")
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=tolerance, abs=tolerance), path
    else:
        assert first == second, path


def assert_weights_of_one(name, folder, one):
    """That both processes end with the weights of a run in one, and that it trained."""
    weights, found = read(folder, name)
    assert found["processes"] == 2
    expected = cases.weights(one.model)
    assert cases.largest_difference(weights, expected) < 1e-6
    assert cases.largest_difference(expected, cases.weights(ddp_runs.model_of(name))) > 1e-3
    assert runs.same(weights, read(folder, name, 1)[0])


def assert_numbers_of_one(name, folder, one, *, losses=True):
    """That importance, tables and logs are those of a run in one process."""
    _, found = read(folder, name)
    expected = json.loads(json.dumps(ddp_runs.result(one)))
    if losses:
        if name not in ddp_runs.OTHER_TABLES:
            assert_close(found["table"], expected["table"], 2e-4)
        assert_close(found["transfer"], expected["transfer"], 2e-3)
        assert_close(found["log"], expected["log"], 2e-3)
    for objective in ddp_runs.RUNS[name]["objectives"]:
        kind = f"importance-{objective}"
        mine = runs.state_tensors(folder / name.replace(" ", "-") / "run", kind)
        other = runs.state_tensors(Path(one.args.output_dir), kind)
        scale = max(float(each.abs().max()) for each in other.values())
        assert cases.largest_difference(mine, other) < 1e-3 * scale


@each_run
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    assert_weights_of_one(name, two(name), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(name, two, one):
    assert_numbers_of_one(name, two(name), one(name))


@pytest.mark.parametrize("name", [pytest.param("sft and dpo", marks=pytest.mark.slow), "ppo"])
def test_two_processes_that_were_killed_go_on_to_the_last_bit(name, two, tmp_path):
    killed = launch(tmp_path, "kill", name)
    assert killed.returncode != 0
    run = tmp_path / name.replace(" ", "-") / "run"
    assert list(run.glob("stage-003-*/checkpoint-*")), killed.stderr[-2000:]
    done = launch(tmp_path, "resume", name)
    assert done.returncode == 0, done.stderr[-4000:]
    assert runs.same(read(tmp_path, name)[0], read(two(name), name)[0])
    assert read(tmp_path, name)[1]["table"] == read(two(name), name)[1]["table"]


def test_accelerate_launch_that_is_told_to_end_saves_and_goes_on(two, tmp_path):
    name = "sft and dpo"
    ended = launch(tmp_path, "end", name, launcher=ACCELERATE)
    assert ended.returncode != 0
    run = tmp_path / name.replace(" ", "-") / "run"
    assert [each.name for each in run.glob("stage-*/checkpoint-*")] == ["checkpoint-1"], ended.stderr[-4000:]
    done = launch(tmp_path, "resume", name, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr[-4000:]
    weights, found = read(tmp_path, name)
    assert (found["processes"], found["began at"]) == (2, [1])
    assert runs.same(weights, read(two(name), name)[0])


@pytest.mark.slow
def test_two_processes_go_around_damage_together_or_end_together(two, tmp_path):
    """The main process alone looks at the files; the other one neither trains on something else nor waits for ever."""
    name = "sft and dpo"
    assert launch(tmp_path, "kill", name).returncode != 0
    run = tmp_path / name.replace(" ", "-") / "run"
    checkpoints = sorted(run.glob("stage-003-*/checkpoint-*"))
    assert "rng_state_1.pth" in json.loads((checkpoints[-1] / "hbat_checksums.json").read_text())["files"]
    weights = run / "state" / "weights-003.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    older = [(each, each.read_bytes()) for each in run.glob("hbat_state.previous.json")]
    older[0][0].write_text("rot")
    lost = launch(tmp_path, "resume", name)
    assert lost.returncode != 0
    assert "holds no complete state of its run" in lost.stderr
    older[0][0].write_bytes(older[0][1])
    done = launch(tmp_path, "resume", name)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weights-003.safetensors has" in done.stderr
    assert runs.same(read(tmp_path, name)[0], read(two(name), name)[0])
    assert runs.same(*(read(tmp_path, name, rank)[0] for rank in (0, 1)))
