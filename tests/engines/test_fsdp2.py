"""Two processes that share a model by FSDP2 train what one trains: weights, state, tables and logs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import ddp_runs
import fsdp_runs
import pytest
import runs
import test_ddp
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
#: transformers 4.57 takes the version of FSDP from `accelerate launch` alone.
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
SHARDED = {"STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
FULL = {"STATE_DICT_TYPE": "FULL_STATE_DICT"}

#: What `make test` runs; the others take the minutes of `make test-all`.
QUICK = ["sft and dpo", "lora", "ppo"]
SLOW = [
    "tied", "accumulation", "tensor importance, proximal", "fisher", "adam and lora of rank one",
    "adam, freeze, end_weight, random importance", "checkpointing", "kto", "adam, ppo and lora",
]  # fmt: skip
each_run = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])


def launch(folder, mode, *names, environment=SHARDED, worker=fsdp_runs):
    """Run two processes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ACCELERATE", "FSDP"))}
    launched = fsdp_runs.LAUNCHED | {"FSDP_STATE_DICT_TYPE": environment["STATE_DICT_TYPE"]} if BEFORE_5 else {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*torchrun, str(Path(worker.__file__)), str(folder), mode, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=test_ddp.TIMEOUT,
        env=kept | launched | environment | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"},
    )


def succeed(*args, **options):
    done = launch(*args, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of a run in two processes; the runs of a group share one start of the processes."""

    @functools.cache
    def train(mode, *group):
        folder = tmp_path_factory.mktemp("two")
        return folder, launch(folder, mode, *group)  # not raised here, or each test would try again

    def trained(name="lora"):
        folder, done = train("train and check", *QUICK) if name in QUICK else train("train", *SLOW)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return trained


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    test_ddp.assert_weights_of_one(name, two(name), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(name, two, one):
    # transformers 4.57 averages a loss over processes in another way than over batches, also under DDP.
    test_ddp.assert_numbers_of_one(name, two(name), one(name), losses=not BEFORE_5)


@each_run
def test_each_process_holds_half_of_model_anchor_reference_and_importance(name, two):
    """That every trainer's parameters and gradients are shared, the runs themselves assert at every step."""
    shares = [test_ddp.read(two(name), name, rank)[1]["shares"] for rank in (0, 1)]
    assert shares[0].keys() >= {"model", "anchor"}
    assert ("reference" in shares[0]) == (ddp_runs.RUNS[name].get("model", "full") in {"full", "tied"})
    for what, share in shares[0].items():
        assert share + shares[1][what] == pytest.approx(1.0)
        uneven = name == "adam and lora of rank one" and what != "model"  # a rank of one cannot be halved
        assert 0.45 < share < 0.55 or uneven, what


@pytest.mark.parametrize("name", ["sft and dpo", "lora"])
def test_the_reference_is_the_model_at_the_start_of_every_stage(name, two):
    assert test_ddp.read(two(name), name)[1]["first rewards"] == {"1": [0.0, 0.0], "3": [0.0, 0.0]}


@pytest.mark.parametrize("name", ["sft and dpo", pytest.param("tied", marks=pytest.mark.slow)])
def test_what_is_saved_is_a_whole_model_like_any_other(name, two):
    folder = two(name) / name.replace(" ", "-")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert runs.same(cases.weights(model), test_ddp.read(two(name), name)[0])


def test_what_is_saved_is_the_adapter_alone(two):
    from peft import PeftModel

    saved = two("lora") / "lora" / "model"
    assert not [each for each in saved.iterdir() if each.is_dir()]
    model = PeftModel.from_pretrained(cases.tiny_llama(0), saved, is_trainable=True)
    assert runs.same(cases.weights(model), test_ddp.read(two("lora"), "lora")[0])


# --- the mathematics on uneven and empty parts --------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def checks(two, request):
    return json.loads((two() / f"checks-{request.param}.json").read_text())


def test_some_parts_are_uneven_and_some_are_empty(two):
    rows = [json.loads((two() / f"checks-{rank}.json").read_text())["rows here"] for rank in (0, 1)]
    assert [each["uneven"] for each in rows] == [3, 2]
    assert [each["empty"] for each in rows] == [1, 0]


def test_shared_tensors_give_the_numbers_of_whole_ones(checks):
    assert checks["cut as torch does"]
    assert checks["shared"].keys() == checks["whole"].keys()
    for what, expected in checks["whole"].items():
        if isinstance(expected[0], str):
            assert checks["shared"][what] == expected, what
        else:
            assert checks["shared"][what] == pytest.approx(expected, rel=1e-6, abs=1e-7), what


def test_a_fault_on_one_process_is_named_on_all(checks):
    assert checks["not finite"] == "even"
    assert "The importance of 'even' is not finite" in checks["refusal"]


def test_a_weight_that_is_not_finite_on_one_process_stops_all(two):
    messages = {(two() / f"poison-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "is not finite at the end of stage 1" in messages.pop()


# --- without a run --------------------------------------------------------------------------------------------------


ALONE = {"callback": fsdp_runs.callback_alone, "ppo": fsdp_runs.ppo_alone}


def assert_trained_as_in_one(name, folder, trainer):
    """That a trainer without a run left in a folder what it leaves in one process."""
    found, expected = load_file(folder / f"{name}.safetensors"), cases.weights(trainer.model)
    assert cases.largest_difference(found, expected) < 1e-6
    log = json.loads((folder / f"{name}.json").read_text())
    for key in ("ewc/penalty", "ewc/grad_norm_ratio", "eval_reward"):
        one = [each[key] for each in trainer.state.log_history if key in each]
        assert [each[key] for each in log if key in each] == pytest.approx(one, rel=2e-3), key


@pytest.mark.parametrize("name", ALONE)
def test_callback_and_ppo_trainer_alone_train_what_they_train_in_one_process(name, two, tmp_path):
    assert_trained_as_in_one(name, two(), ALONE[name](tmp_path, {}))


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("sft and dpo", SHARDED),
        ("ppo", SHARDED),
        ("adam and lora of rank one", SHARDED),
        ("adam and lora of rank one", FULL),
        ("adam, ppo and lora", FULL),
    ],
)
def test_two_processes_that_were_killed_go_on_to_the_last_bit(name, environment, two, tmp_path):
    killed = launch(tmp_path, "kill", name, environment=environment)
    assert killed.returncode != 0
    succeed(tmp_path, "resume", name, environment=environment)
    weights, found = test_ddp.read(tmp_path, name)
    assert found["began at"] == [1]  # not anew: from the host's checkpoint inside the last stage
    assert runs.same(weights, test_ddp.read(two(name), name)[0])
    assert found["table"] == test_ddp.read(two(name), name)[1]["table"]
    assert found["log"] == test_ddp.read(two(name), name)[1]["log"]


# --- from the command line ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_trains_under_a_launch_for_fsdp2_that_reads_the_model_once(tmp_path):
    """As `accelerate launch` starts it with an FSDP2 configuration: it says so in the environment alone."""
    succeed(tmp_path, "command line", environment=SHARDED | fsdp_runs.LAUNCHED)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    start = cases.tiny_llama(0).state_dict()
    assert saved.keys() == start.keys()
    assert all(torch.isfinite(each).all() for each in saved.values())
    assert 1e-3 < cases.largest_difference(saved, start) < 1.0
    assert json.loads((tmp_path / "run" / "hbat_state.json").read_text())["next_stage"] == 4


@pytest.mark.slow
@pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 says FSDP1 here, which is refused")
def test_a_run_on_a_cpu_where_fsdp_is_left_aside_is_refused(tmp_path):
    done = launch(tmp_path, "without fsdp", "sft and dpo")
    assert done.returncode != 0
    assert "on a CPU it leaves FSDP aside without a word" in done.stderr
