"""Two processes that share a model by FSDP2 train what one trains: weights, state, tables and logs."""

import functools
import json

import cases
import ddp_runs
import fsdp_runs
import launched
import pytest
import runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
#: transformers 4.57 takes the version of FSDP from `accelerate launch` alone.
SHARDED = {"STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
FULL = {"STATE_DICT_TYPE": "FULL_STATE_DICT"}
QUICK = ["sft and dpo"]
SLOW = [
    "lora", "ppo", "tied", "accumulation", "tensor importance, proximal", "fisher", "adam and lora of rank one",
    "adam, freeze, end_weight, random importance", "checkpointing", "kto", "adam, ppo and lora",
]  # fmt: skip
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
each_run = launched.marked(QUICK, SLOW)


def launch(folder, mode, *names, environment=SHARDED):
    told = fsdp_runs.LAUNCHED | {"FSDP_STATE_DICT_TYPE": environment["STATE_DICT_TYPE"]} if launched.BEFORE_5 else {}
    return launched.launch(fsdp_runs, folder, mode, *names, environment=told | environment)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of a run in two processes; the runs of a group share one start of the processes."""

    @functools.cache
    def train(mode, *group):
        folder = tmp_path_factory.mktemp("two")
        return folder, launch(folder, mode, *group)  # not raised here, or each test would try again

    def trained(name="lora"):
        folder, done = train("train", *QUICK) if name in QUICK else train("train and check", *SLOW)
        launched.succeeded(done)
        return folder

    return trained


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    launched.assert_weights_of_one(name, two(name), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(name, two, one):
    # transformers 4.57 averages a loss over processes in another way than over batches, also under DDP.
    launched.assert_numbers_of_one(name, two(name), one(name), losses=not launched.BEFORE_5)


@each_run
def test_each_process_holds_half_of_model_anchor_reference_and_importance(name, two):
    """That every trainer's parameters and gradients are shared, the runs themselves assert at every step."""
    shares = [launched.read(two(name), name, rank)[1]["shares"] for rank in (0, 1)]
    assert shares[0].keys() >= {"model", "anchor"}
    assert ("reference" in shares[0]) == (ddp_runs.RUNS[name].get("model", "full") in {"full", "tied"})
    for what, share in shares[0].items():
        assert share + shares[1][what] == pytest.approx(1.0)
        uneven = name == "adam and lora of rank one" and what != "model"  # a rank of one cannot be halved
        assert 0.45 < share < 0.55 or uneven, what


@pytest.mark.parametrize("name", ["sft and dpo", slow("lora")])
def test_the_reference_is_the_model_at_the_start_of_every_stage(name, two):
    assert launched.read(two(name), name)[1]["first rewards"] == {"1": [0.0, 0.0], "3": [0.0, 0.0]}


@pytest.mark.parametrize("name", ["sft and dpo", slow("tied")])
def test_what_is_saved_is_a_whole_model_like_any_other(name, two):
    folder = launched.place_of(two(name), name)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert runs.same(cases.weights(model), launched.read(two(name), name)[0])


@pytest.mark.slow
def test_what_is_saved_is_the_adapter_alone(two):
    from peft import PeftModel

    saved = two("lora") / "lora" / "model"
    assert not [file for file in saved.iterdir() if file.is_dir()]
    model = PeftModel.from_pretrained(cases.tiny_llama(0), saved, is_trainable=True)
    assert runs.same(cases.weights(model), launched.read(two("lora"), "lora")[0])


@pytest.mark.parametrize("name", ["sft and dpo", slow("lora")])
def test_the_line_of_the_last_stage_is_that_of_one_process(name, two, one):
    place, found = launched.place_of(two(name), name), launched.read(two(name), name)[1]
    expected = one(name).front([0, 1])
    for objective, metric in expected.headline.items():
        scores = [row[objective][metric] for row in found["front"]]
        assert scores == found["table"][objective][-2:]
        assert scores == pytest.approx(expected.series(objective), rel=2e-3)
    if name != "lora":
        start, end = (load_file(place / "run" / "state" / f"weights-00{number}.safetensors") for number in (3, 4))
        half = cases.weights(AutoModelForCausalLM.from_pretrained(place / "half"))
        assert cases.largest_difference(half, {key: (start[key] + end[key]) / 2 for key in half}) < 1e-6


# --- the mathematics on uneven and empty parts --------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def checks(two, request):
    return json.loads((two() / f"checks-{request.param}.json").read_text())


@pytest.mark.slow
def test_some_parts_are_uneven_and_some_are_empty(two):
    rows = [json.loads((two() / f"checks-{rank}.json").read_text())["rows here"] for rank in (0, 1)]
    assert [counts["uneven"] for counts in rows] == [3, 2]
    assert [counts["empty"] for counts in rows] == [1, 0]


@pytest.mark.slow
def test_shared_tensors_give_the_numbers_of_whole_ones(checks):
    assert checks["cut as torch does"]
    assert checks["shared"].keys() == checks["whole"].keys()
    for what, expected in checks["whole"].items():
        if isinstance(expected[0], str):
            assert checks["shared"][what] == expected, what
        else:
            assert checks["shared"][what] == pytest.approx(expected, rel=1e-6, abs=1e-7), what


@pytest.mark.slow
def test_a_fault_on_one_process_is_named_on_all(checks):
    assert checks["not finite"] == "even"
    assert "The importance of 'even' is not finite" in checks["refusal"]


@pytest.mark.slow
def test_sharded_weights_are_not_summed_with_whole_ones(checks):
    assert "1 of 4 tensors are sharded and the others are whole" in checks["mixed"]


@pytest.mark.slow
def test_a_weight_that_is_not_finite_on_one_process_stops_all(two):
    messages = {(two() / f"poison-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "is not finite at the end of stage 1" in messages.pop()


# --- without a run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp_runs.ALONE)
def test_callback_and_ppo_trainer_alone_train_what_they_train_in_one_process(name, two, tmp_path):
    launched.assert_trained_as_in_one(name, two(), fsdp_runs.ALONE[name](tmp_path, {}))


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_resume_to_the_last_bit(two):
    folder = two("lora")
    launched.assert_same_run("lora", folder / "stopped", folder, began_at=[0, 0, 0, 0, 1])


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
def test_two_processes_that_were_killed_resume_to_the_last_bit(name, environment, two, tmp_path):
    assert launch(tmp_path, "kill", name, environment=environment).returncode != 0
    launched.succeeded(launch(tmp_path, "resume", name, environment=environment))
    # Not anew: from the trainer's checkpoint inside the last stage.
    launched.assert_same_run(name, tmp_path, two(name), began_at=[1])


# --- from the command line ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_continue_a_finished_run(tmp_path):
    name = "adam and lora of rank one"
    launched.succeeded(launch(tmp_path, "continue", name))
    one = ddp_runs.train_twice(name, tmp_path / "one")
    launched.assert_weights_of_one(name, tmp_path, one)
    launched.assert_numbers_of_one(name, tmp_path, one, losses=not launched.BEFORE_5)


@pytest.mark.slow
def test_the_command_trains_under_a_launch_for_fsdp2_that_reads_the_model_once(tmp_path):
    """As `accelerate launch` starts it with an FSDP2 configuration: it says so in the environment alone."""
    launched.succeeded(launch(tmp_path, "command line", environment=SHARDED | fsdp_runs.LAUNCHED))
    launched.assert_trained(load_file(tmp_path / "run" / "model.safetensors"))
    assert json.loads((tmp_path / "run" / "hbat_state.json").read_text())["next_stage"] == 4


@pytest.mark.slow
@pytest.mark.skipif(launched.BEFORE_5, reason="transformers 4.57 says FSDP1 here, which is refused")
def test_a_run_on_a_cpu_where_accelerate_ignores_fsdp_is_refused(tmp_path):
    done = launch(tmp_path, "without fsdp", "sft and dpo")
    assert done.returncode != 0
    assert "on a CPU it silently ignores FSDP" in done.stderr
