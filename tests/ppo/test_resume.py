"""PPO that was interrupted anywhere, also in the middle of a rollout, resumes bit for bit."""

import functools
import json
from pathlib import Path

import cases
import ppo_cases
import pytest
import torch
from kills import run_until_killed
from ppo_cases import build, logged, trained

OPTIONS = {
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "max_steps": -1,
    "num_train_epochs": 2,
    "adaptive_kl": True,
    "kl_horizon": 30.0,
    "kl_target": 0.01,
    "logging_steps": 3,
}
SAVES = {"save_strategy": "steps", "save_total_limit": 1}
MODELS = {
    "full": cases.tiny_llama,
    "lora": functools.partial(cases.lora_llama, dropout=0.1),
}
VARIANTS = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "separate critic": ("full", {"critic": "separate"}),
    "lora with a separate critic": ("lora", {"critic": "separate"}),
    "bf16 and accumulation": (
        "full",
        {"bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ),
    "tied and early stop": ("tied", {"target_kl": 1e-7}),
}
MODELS["tied"] = functools.partial(cases.tiny_llama, tied=True)
#: Four optimizer steps per rollout, eight per epoch: in the first and the second pass over a rollout, at its end, and
#: in the second epoch.
STEPS = {"first pass": 5, "second pass": 7, "boundary": 4, "second epoch": 10}


def settings(variant):
    model, options = VARIANTS[variant]
    return MODELS[model], OPTIONS | options


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    @functools.cache
    def train(variant):
        make, options = settings(variant)
        trainer = build(make(0), tmp_path_factory.mktemp("whole"), rows=ppo_cases.prompts(8), **options)
        trainer.train()
        return trainer

    return train


def log(trainer):
    """The log without run times."""
    times = ("seconds/", "train_", "total_flos")
    return [
        {key: value for key, value in each.items() if not key.startswith(times)} for each in trainer.state.log_history
    ]


def resumed(variant, folder, **more):
    make, options = settings(variant)
    trainer = build(make(0), folder, rows=ppo_cases.prompts(8), **options | more)
    (checkpoint,) = folder.glob("checkpoint-*")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def assert_equal(trainer, expected):
    assert cases.largest_difference(trained(trainer), trained(expected)) == 0.0
    assert trainer.state.global_step == expected.state.global_step == 16
    assert log(trainer)[:-1] == log(expected)[:-1]  # the last holds the mean loss since the start of the process
    assert trainer.kept_state()["kl_coef"] == expected.kept_state()["kl_coef"]


#: What each of the slow ones combines is also in one that is not.
CUTS = [
    *(("full", step) for step in STEPS),
    ("lora with a separate critic", "first pass"),
    ("bf16 and accumulation", "second pass"),
    ("tied and early stop", "first pass"),
    pytest.param("lora", "first pass", marks=pytest.mark.slow),
    pytest.param("separate critic", "first pass", marks=pytest.mark.slow),
]


class Stop(Exception):  # noqa: N818 - it is no error
    pass


class CutOff(ppo_cases.PPOTrainer):
    def _save_checkpoint(self, *args, **kwargs):
        super()._save_checkpoint(*args, **kwargs)
        raise Stop


def interrupt(make, folder, step, **options):
    trainer = build(make(0), folder, kind=CutOff, rows=ppo_cases.prompts(8), **options | SAVES | {"save_steps": step})
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize(("variant", "step"), CUTS)
def test_training_from_a_checkpoint_ends_as_if_it_was_never_cut_off(variant, step, whole, tmp_path):
    make, options = settings(variant)
    interrupt(make, tmp_path, STEPS[step], **options)
    assert (tmp_path / f"checkpoint-{STEPS[step]}" / "rollout_0.safetensors").exists() == (step != "boundary")
    assert_equal(resumed(variant, tmp_path), whole(variant))


def test_a_checkpoint_in_the_middle_of_a_rollout_without_it_is_refused(tmp_path):
    make, options = settings("full")
    interrupt(make, tmp_path, 5, **options)
    (tmp_path / "checkpoint-5" / "rollout_0.safetensors").unlink()
    with pytest.raises(RuntimeError, match="in the middle of rollout 1, which the checkpoint does not hold"):
        resumed("full", tmp_path)


def test_a_checkpoint_holds_no_rollout_at_its_end_and_nothing_pickled_of_ours(tmp_path):
    make, options = settings("full")
    interrupt(make, tmp_path, 4, **options)
    names = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert names >= {"critic.safetensors", "ppo_state.json", "model.safetensors"}
    state = json.loads((tmp_path / "checkpoint-4" / "ppo_state.json").read_text(encoding="utf-8"))
    assert state["skips"] is False


PROGRAM = """
sys.path.insert(0, sys.argv[4])
import os, signal
import ppo_cases
import test_resume as module

calls = 0

def letters(prompts, completions, completion_ids, target, **kwargs):
    global calls
    calls += 1
    if calls == 3 and sys.argv[2] == "rollout":
        os.kill(os.getpid(), signal.SIGKILL)
    return ppo_cases.letters(prompts, completions, completion_ids, target)

class InUpdate(ppo_cases.PPOTrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 10 and sys.argv[2] == "update":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)

make, options = module.settings(sys.argv[3])
options |= module.SAVES | {"save_steps": 3}
rows = ppo_cases.prompts(8)
ppo_cases.build(make(0), sys.argv[1], kind=InUpdate, rows=rows, reward_funcs=letters, **options).train()
"""


@pytest.mark.slow  # processes; above, training is interrupted in one
@pytest.mark.parametrize(("moment", "variant", "left"), [("rollout", "full", 6), ("update", "lora", 9)])
def test_a_process_that_was_killed_resumes_in_another(moment, variant, left, whole, tmp_path):
    run_until_killed(PROGRAM, tmp_path, moment, variant, Path(__file__).parent)
    assert [each.name for each in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{left}"]
    assert_equal(resumed(variant, tmp_path), whole(variant))


def test_the_critic_is_in_the_state_and_is_trained(whole):
    state = whole("full").kept_state()
    assert state["critic.head.weight"].abs().max() > 0
    assert state["kl_coef"].dtype == torch.float64
    assert state["kl_coef"] != 0.05
    assert logged(whole("full"), "kl_coef")[0] == pytest.approx(0.05)
