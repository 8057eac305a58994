"""Two processes under DeepSpeed's ZeRO-1, -2 and -3 train what one trains: weights, importance, tables and logs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import ddp_runs
import deepspeed_runs
import pytest
import runs
import test_ddp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
]
TIMEOUT = 1200  # seconds; DeepSpeed compiles its communication on CPUs once, which takes minutes

STAGES = [1, 2, 3]
NAMES = [
    "sft and dpo", "lora", "tied", "accumulation", "adam", "adam and lora of rank one", "kto", "fisher",
    "fisher of samples", "checkpointing", "odd sizes",
]  # fmt: skip
each_run = pytest.mark.parametrize(
    ("stage", "name"), [pytest.param(stage, name, id=f"{stage}-{name}") for stage in STAGES for name in NAMES]
)
each_stage = pytest.mark.parametrize("stage", STAGES)


def launch(folder, stage, mode, *names, worker=Path(deepspeed_runs.__file__)):
    """Run two processes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ACCELERATE"))}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # ninja, which compiles
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*torchrun, str(worker), str(folder), str(stage), mode, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        env=kept | {"PATH": tools, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of all runs at one stage of ZeRO, which share one start of the processes."""

    @functools.cache
    def train(stage):
        folder = tmp_path_factory.mktemp(f"zero-{stage}")
        done = launch(folder, stage, "train", *NAMES)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return train


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(stage, name, two, one):
    """That the optimizer has a piece of the weights alone, the runs themselves assert at every step."""
    test_ddp.assert_weights_of_one(name, two(stage), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(stage, name, two, one):
    test_ddp.assert_numbers_of_one(name, two(stage), one(name))


@each_run
def test_no_stage_leaves_anything_of_the_engine_on_the_model(stage, name, two):
    found = test_ddp.read(two(stage), name)[1]
    assert (found["marks"], found["views"]) == ([], 0)


@each_stage
@pytest.mark.parametrize("name", ["sft and dpo", "lora"])
def test_the_reference_is_the_model_at_the_start_of_every_stage(stage, name, two):
    assert test_ddp.read(two(stage), name)[1]["first rewards"] == {"1": [0.0, 0.0], "3": [0.0, 0.0]}


@each_stage
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_moments_are_kept_by_parameter_as_in_one_process(stage, objective, two, one):
    kind = f"optimizer-{objective}"
    mine = runs.state_tensors(two(stage) / "adam" / "run", kind)
    other = runs.state_tensors(Path(one("adam").args.output_dir), kind)
    assert {name: each.shape for name, each in mine.items()} == {name: each.shape for name, each in other.items()}
    for name, each in other.items():
        assert float((mine[name] - each).abs().max()) <= 1e-4 * float(each.abs().max()) + 1e-9, name


@each_stage
def test_what_is_saved_is_a_whole_model_like_any_other(stage, two):
    model = AutoModelForCausalLM.from_pretrained(two(stage) / "sft-and-dpo" / "model")
    assert runs.same(cases.weights(model), test_ddp.read(two(stage), "sft and dpo")[0])


@each_stage
def test_a_gradient_that_is_not_finite_on_one_process_stops_all(stage, two):
    """DeepSpeed would leave the step out and go on."""
    messages = {(two(stage) / f"poison-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "The gradient of " in messages.pop()


@each_stage
def test_a_bound_callback_trains_what_it_trains_in_one_process(stage, two, tmp_path):
    trainer = deepspeed_runs.callback_alone(tmp_path)
    found = load_file(two(stage) / "callback.safetensors")
    assert cases.largest_difference(found, cases.weights(trainer.model)) < 1e-6
    log = json.loads((two(stage) / "callback.json").read_text())
    for key in ("ewc/penalty", "ewc/drift", "ewc/grad_norm_ratio", "grad_norm"):
        expected = [each[key] for each in trainer.state.log_history if key in each]
        assert [each[key] for each in log if key in each] == pytest.approx(expected, rel=2e-3), key


@each_stage
def test_a_callback_that_is_not_bound_is_refused(stage, two):
    for rank in (0, 1):
        assert "Call `callback.bind(trainer)`" in (two(stage) / f"unbound-{rank}.txt").read_text()


@pytest.mark.parametrize(("stage", "name"), [(2, "sft and dpo"), (2, "adam"), (3, "adam")])
def test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not(stage, name, two, tmp_path):
    killed = launch(tmp_path, stage, "kill", name)
    assert killed.returncode != 0
    done = launch(tmp_path, stage, "resume", name)
    assert done.returncode == 0, done.stderr[-4000:]
    weights, found = test_ddp.read(tmp_path, name)
    assert found["began at"] == [0]  # the last stage alone, from its start: DeepSpeed's checkpoints are not read
    assert runs.same(weights, test_ddp.read(two(stage), name)[0])
    assert found["table"] == test_ddp.read(two(stage), name)[1]["table"]
