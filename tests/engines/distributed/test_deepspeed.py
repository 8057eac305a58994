"""Two processes under DeepSpeed's ZeRO-1, -2 and -3 train what one trains: weights, importance, tables and logs."""

import functools
import importlib.util
import itertools
from pathlib import Path

import cases
import ddp_runs
import deepspeed_runs
import launched
import pytest
import runs
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
]
STAGES = [1, 2, 3]
NAMES = [
    "sft and dpo", "lora", "tied", "accumulation", "adam", "adam and lora of rank one", "kto", "fisher",
    "fisher of samples", "checkpointing", "odd sizes",
]  # fmt: skip
each_run = pytest.mark.parametrize(("stage", "name"), list(itertools.product(STAGES, NAMES)))
each_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of runs at one stage of ZeRO, which share one start of the processes."""

    @functools.cache
    def train(stage, mode, *names):
        folder = tmp_path_factory.mktemp(f"zero-{stage}")
        launched.succeeded(deepspeed_runs.launch(deepspeed_runs, folder, stage, mode, *names))
        return folder

    return lambda stage: train(stage, "train and check", *NAMES)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(stage, name, two, one):
    """That the optimizer has a piece of the weights alone, the runs themselves assert at every step."""
    launched.assert_weights_of_one(name, two(stage), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(stage, name, two, one):
    launched.assert_numbers_of_one(name, two(stage), one(name))


@each_run
def test_no_stage_leaves_anything_of_the_engine_on_the_model(stage, name, two):
    found = launched.read(two(stage), name)[1]
    assert (found["marks"], found["views"]) == ([], 0)


@each_stage
@pytest.mark.parametrize("name", ["sft and dpo", "lora"])
def test_the_reference_is_the_model_at_the_start_of_every_stage(stage, name, two):
    assert launched.read(two(stage), name)[1]["first rewards"] == {"1": [0.0, 0.0], "3": [0.0, 0.0]}


@each_stage
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_moments_are_kept_by_parameter_as_in_one_process(stage, objective, two, one):
    kind = f"optimizer-{objective}"
    mine = runs.state_tensors(two(stage) / "adam" / "run", kind)
    other = runs.state_tensors(Path(one("adam").args.output_dir), kind)
    assert {name: tensor.shape for name, tensor in mine.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
    for name, tensor in other.items():
        assert float((mine[name] - tensor).abs().max()) <= 1e-4 * float(tensor.abs().max()) + 1e-9, name


@each_stage
def test_what_is_saved_is_a_whole_model_like_any_other(stage, two):
    model = AutoModelForCausalLM.from_pretrained(two(stage) / "sft-and-dpo" / "model")
    assert runs.same(cases.weights(model), launched.read(two(stage), "sft and dpo")[0])


@each_stage
def test_a_gradient_that_is_not_finite_on_one_process_stops_all(stage, two):
    """DeepSpeed would leave the step out and go on."""
    messages = {(two(stage) / f"poison-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "The gradient of " in messages.pop()


@each_stage
def test_a_bound_callback_trains_what_it_trains_in_one_process(stage, two, tmp_path):
    launched.assert_trained_as_in_one("callback", two(stage), deepspeed_runs.callback_alone(tmp_path))


@each_stage
def test_a_callback_that_is_not_bound_is_refused(stage, two):
    for rank in (0, 1):
        assert "Call `callback.bind(trainer)`" in (two(stage) / f"unbound-{rank}.txt").read_text()


@pytest.mark.parametrize(("stage", "name"), [(2, "sft and dpo"), (2, "adam"), (3, "adam")])
def test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not(stage, name, two, tmp_path):
    """No checkpoint is written: DeepSpeed could read none of another stage's engine."""
    arguments = (deepspeed_runs, tmp_path, stage)
    assert deepspeed_runs.launch(*arguments, "kill", name).returncode != 0
    assert not list(tmp_path.rglob("checkpoint-*"))
    launched.succeeded(deepspeed_runs.launch(*arguments, "resume", name))
    launched.assert_same_run(name, tmp_path, two(stage), began_at=[0], log=False)  # the last stage alone
