"""Starts two processes that run a worker of this folder, and compares what they leave with a run in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import ddp_runs
import pytest
import runs
import torch
import transformers
from safetensors.torch import load_file

TIMEOUT = 600  # seconds; a process that is lost leaves the other waiting
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip

#: Largest difference that the order of sums makes, far below what training moves: up to 1.3e-6 with AVX-512.
ROUNDING = 1e-5
#: Their losses over several processes are other means.
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5


def launch(worker, *arguments, launcher=TORCHRUN, environment=None, timeout=TIMEOUT):
    """Run a module in two processes (`accelerate launch --cpu` would start one, silently)."""
    hidden = ("PYTEST", "ACCELERATE", "FSDP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(Path(worker.__file__)), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=kept | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"} | (environment or {}),
    )


def succeeded(done):
    # A process that aborts lists every module of its own, which would fill what is shown.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Extension modules:")]
    assert done.returncode == 0, "\n".join(said)[-8000:]
    return done


def place_of(folder, name):
    return folder / name.replace(" ", "-")


def read(folder, name, rank=0):
    """Weights and results of one run of `ddp_runs`."""
    place = place_of(folder, name)
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
    assert cases.largest_difference(weights, expected) < ROUNDING
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
    folders = place_of(folder, name) / "run", Path(one.args.output_dir)
    kinds, others = (set(json.loads((each / "hbat_state.json").read_text())["files"]) for each in folders)
    assert kinds == others
    for kind in [each for each in kinds if each.startswith(("displacement-", "importance-"))]:
        mine, other = (runs.state_tensors(each, kind) for each in folders)
        scale = max(float(tensor.abs().max()) for tensor in other.values())
        assert cases.largest_difference(mine, other) < 1e-3 * scale, kind


def assert_same_run(name, folder, uninterrupted, *, began_at, log=True):
    """That a run that was cut off in its last stage ended, to the last bit, as one that was not."""
    (weights, found), (expected, other) = read(folder, name), read(uninterrupted, name)
    assert found["began at"] == began_at
    assert runs.same(weights, expected)
    assert found["table"] == other["table"]
    if log:
        assert found["log"] == other["log"]


def assert_trained_as_in_one(name, folder, trainer):
    """That a trainer without a run left in a folder what it leaves in one process."""
    found, expected = load_file(folder / f"{name}.safetensors"), cases.weights(trainer.model)
    assert cases.largest_difference(found, expected) < ROUNDING
    log = json.loads((folder / f"{name}.json").read_text())
    for key in ("ewc/penalty", "ewc/drift", "ewc/grad_norm_ratio", "grad_norm", "eval_reward"):
        one = [entry[key] for entry in trainer.state.log_history if key in entry]
        assert [entry[key] for entry in log if key in entry] == pytest.approx(one, rel=2e-3), key


def assert_trained(saved):
    """That saved weights are a trained model of the command line's runs: other than at the start, and finite."""
    start = cases.tiny_llama(0).state_dict()
    assert saved.keys() == start.keys()
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert 1e-3 < cases.largest_difference(saved, start) < 1.0


def marked(quick, slow):
    """Parameters for runs, of which some are run by `make test-all` alone."""
    return pytest.mark.parametrize("name", [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)])
