"""Two processes with a model that transformers sharded when it loaded it train what one process trains."""

import functools
import json

import cases
import ddp_runs
import fsdp_runs
import launched
import loaded_shards_runs
import pytest
import runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
    pytest.mark.skipif(
        not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
        reason="this transformers loads no model in shards",
    ),
]

#: Runs that share a start of the processes.
GROUPS = [
    ["sft and dpo"],
    ["accumulation", "tensor importance, proximal", "fisher", "checkpointing", "kto", "ppo"],
    [
        "lora",
        "tied, lora",
        "adam and lora of rank one",
        "adam, ppo and lora",
        "adam, freeze, end_weight, random importance",
    ],
]
each_run = pytest.mark.parametrize("name", [name for group in GROUPS for name in group])
launch = functools.partial(launched.launch, loaded_shards_runs)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of a run in two processes; the runs of a group share one start of the processes."""

    @functools.cache
    def train(mode, *group):
        folder = tmp_path_factory.mktemp("two")
        return folder, launch(folder, mode, *group)  # not raised here, or each test would try again

    def trained(name):
        group = next((group for group in GROUPS if name in group), None)
        folder, done = train("alone") if group is None else train("train", *group)
        launched.succeeded(done)
        return folder

    return trained


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda name: ddp_runs.train(name, tmp_path_factory.mktemp("one")))


@each_run
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    """That every trainer's parameters and gradients are shared, the runs themselves assert at every step."""
    launched.assert_weights_of_one(name, two(name), one(name))


@each_run
def test_importance_tables_and_logs_are_those_of_one_process(name, two, one):
    launched.assert_numbers_of_one(name, two(name), one(name))


@each_run
def test_each_process_holds_half_of_model_anchor_reference_and_importance(name, two):
    shares = [launched.read(two(name), name, rank)[1]["shares"] for rank in (0, 1)]
    full = ddp_runs.RUNS[name].get("model", "full") == "full"
    assert shares[0].keys() >= ({"model", "anchor", "reference"} if full else {"model"})
    for what, share in shares[0].items():
        assert share + shares[1][what] == pytest.approx(1.0)
        assert 0.45 < share < 0.55, what


@pytest.mark.parametrize("name", ["sft and dpo", "lora"])
def test_the_reference_is_the_model_at_the_start_of_every_stage(name, two):
    assert launched.read(two(name), name)[1]["first rewards"] == {"1": [0.0, 0.0], "3": [0.0, 0.0]}


def test_what_is_saved_is_a_whole_model_like_any_other(two):
    folder = two("sft and dpo") / "sft-and-dpo"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert "distributed_config" not in json.loads((folder / "model" / "config.json").read_text())
    assert runs.same(cases.weights(model), launched.read(two("sft and dpo"), "sft and dpo")[0])


def test_what_is_saved_is_the_adapter_alone(two):
    from peft import PeftModel

    saved = two("lora") / "lora" / "model"
    assert not [file for file in saved.iterdir() if file.is_dir()]
    model = PeftModel.from_pretrained(cases.tiny_llama(0), saved, is_trainable=True)
    assert runs.same(cases.weights(model), launched.read(two("lora"), "lora")[0])


def test_an_adapter_holds_no_trainer_of_a_stage_that_is_over(two):
    assert launched.read(two("lora"), "lora")[1]["hooks"] == 0


@pytest.mark.parametrize("name", fsdp_runs.ALONE)
def test_callback_and_ppo_trainer_alone_train_what_they_train_in_one_process(name, two, tmp_path):
    launched.assert_trained_as_in_one(name, two("alone"), fsdp_runs.ALONE[name](tmp_path, {}))


def test_a_ppo_trainer_alone_saves_adapter_and_critic(two):
    from peft import PeftModel

    folder = two("alone")
    expected = load_file(folder / "lora")
    model = PeftModel.from_pretrained(cases.tiny_llama(0), folder / "ppo", is_trainable=True)
    critic = load_file(folder / "ppo" / "critic.safetensors")
    found = {f"policy.{name}": tensor for name, tensor in cases.weights(model).items()}
    assert runs.same(found | {name: critic[name] for name in expected.keys() - found.keys()}, expected)


@pytest.mark.parametrize(("how", "name"), [("kill", "sft and dpo"), ("kill", "adam and lora of rank one"),
                                           ("kill", "ppo"), ("end", "sft and dpo")])  # fmt: skip
def test_processes_that_were_killed_begin_the_stage_again_and_end_as_if_they_were_not(how, name, two, tmp_path):
    """No checkpoint is written, with `save_steps: 1` where they are killed or at the signal: none could be read."""
    assert launch(tmp_path, how, name).returncode != 0
    assert not list(tmp_path.rglob("checkpoint-*"))
    done = launched.succeeded(launch(tmp_path, "resume", name))
    assert "a stage that is cut off begins again" in done.stderr
    launched.assert_same_run(name, tmp_path, two(name), began_at=[0])  # the last stage alone


def test_the_command_trains_a_model_that_its_configuration_has_loaded_in_shards(tmp_path):
    done = launched.succeeded(launch(tmp_path, "command line"))
    assert "a stage that is cut off begins again" in done.stderr
    launched.assert_trained(load_file(tmp_path / "run" / "model.safetensors"))
