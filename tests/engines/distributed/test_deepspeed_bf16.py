"""Two processes under DeepSpeed's ZeRO-1 and -2 in bfloat16: stages hand float32 weights over, to the last bit."""

import functools
import importlib.util
import json
from pathlib import Path

import bf16_runs
import cases
import ddp_runs
import deepspeed_runs
import launched
import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
]
NAMES = ["sft and dpo", "lora", "tied", "accumulation", "adam", "kto", "fisher"]
STAGES = (1, 2)  # with ZeRO-3 half precision is refused
each_stage = pytest.mark.parametrize("stage", STAGES)


def each_of(names):
    pairs = [(stage, name) for stage in STAGES for name in names]
    return pytest.mark.parametrize(("stage", "name"), pairs, ids=[f"{stage}-{name}" for stage, name in pairs])


each_run = each_of(NAMES)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of all runs at one stage of ZeRO, which share one start of the processes."""

    @functools.cache
    def train(stage):
        folder = tmp_path_factory.mktemp(f"bf16-{stage}")
        names = [*NAMES, *bf16_runs.STILL]
        launched.succeeded(deepspeed_runs.launch(bf16_runs, folder, stage, "train and check", *names))
        return folder

    return train


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


def norm(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


@each_run
def test_two_processes_end_near_one_that_computes_in_float32(stage, name, two, one):
    """Gradients have the 8 bits of bfloat16: of the way that the weights went, a share of it may differ."""
    weights, found = launched.read(two(stage), name)
    assert found["processes"] == 2
    expected, start = cases.weights(one(name).model), cases.weights(ddp_runs.model_of(name))
    moved = norm({key: expected[key] - start[key] for key in start})
    assert norm({key: weights[key] - expected[key] for key in start}) < 0.05 * moved
    assert runs.same(weights, launched.read(two(stage), name, 1)[0])


@each_run
def test_a_run_leaves_a_float32_model_and_a_base_that_is_what_it_was(stage, name, two):
    found = launched.read(two(stage), name)[1]
    assert found["dtypes"] == ["torch.float32"]
    assert found["frozen"]
    assert (found["marks"], found["views"]) == ([], 0)


@each_run
def test_every_stage_starts_at_its_anchor_and_its_reference(stage, name, two):
    found = launched.read(two(stage), name)[1]
    assert found["first drifts"] == [0.0] * 3
    assert all(rewards == [0.0, 0.0] for rewards in found["first rewards"].values())
    assert len(found["first rewards"]) == (2 if name != "kto" else 0)


@each_of(bf16_runs.STILL)
def test_stages_without_a_learning_rate_leave_every_bit(stage, name, two):
    """The float32 weights pass through bfloat16 in every stage, and are no numbers of it."""
    options = bf16_runs.STILL[name]
    start = cases.weights(ddp_runs.MODELS[options.get("model", "full")](0))
    assert not runs.same(start, {key: tensor.bfloat16().float() for key, tensor in start.items()})
    for rank in (0, 1):
        weights, found = launched.read(two(stage), name, rank)
        assert runs.same(weights, start)
        assert found["dtypes"] == ["torch.float32"]


@each_of(bf16_runs.PLAIN)
def test_without_a_penalty_weights_are_those_of_plain_trainers_that_hand_over(stage, name, two):
    """Bit for bit; of a model in bfloat16, those of plain trainers as they are."""
    weights = load_file(two(stage) / f"plain-{name}.safetensors")
    assert runs.same(weights, load_file(two(stage) / f"by-hand-{name}.safetensors"))
    build, hands_over = bf16_runs.PLAIN[name]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32 if hands_over else torch.bfloat16}
    assert cases.largest_difference(weights, cases.weights(build(0))) > 1e-3


@each_stage
def test_the_penalty_joins_the_gradients_in_float32(stage, two):
    """A third of it would be lost in the engine's own gradients, which are bfloat16."""
    for rank in (0, 1):
        seen = json.loads((two(stage) / f"penalty-{rank}.json").read_text())
        assert len(seen) == 3 * 2  # steps, and groups with weight decay and without
        assert {tuple(step["dtypes"]) for step in seen} == {("torch.bfloat16", "torch.float32")}
        assert max(step["error"] for step in seen) < 5e-7
        assert max(step["lost in bfloat16"] for step in seen) > 0.2


@each_stage
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_moments_are_kept_by_parameter_in_float32(stage, objective, two, one):
    kind = f"optimizer-{objective}"
    mine = runs.state_tensors(two(stage) / "adam" / "run", kind)
    other = runs.state_tensors(Path(one("adam").args.output_dir), kind)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in other.items()
    }


@each_stage
def test_what_is_saved_is_the_float32_model(stage, two):
    model = AutoModelForCausalLM.from_pretrained(two(stage) / "sft-and-dpo" / "model", dtype="float32")
    weights = launched.read(two(stage), "sft and dpo")[0]
    assert runs.same(cases.weights(model), weights)
    assert not runs.same(weights, {key: tensor.bfloat16().float() for key, tensor in weights.items()})


@each_stage
def test_a_gradient_that_is_not_finite_on_one_process_stops_all(stage, two):
    messages = {(two(stage) / f"poison-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "The gradient of " in messages.pop()


@pytest.mark.parametrize("name", ["sft and dpo", "adam"])
def test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not(name, two, tmp_path):
    assert deepspeed_runs.launch(bf16_runs, tmp_path, 2, "kill", name).returncode != 0
    launched.succeeded(deepspeed_runs.launch(bf16_runs, tmp_path, 2, "resume", name))
    launched.assert_same_run(name, tmp_path, two(2), began_at=[0], log=False)
