"""PPO as the stages of a run: the right reference in each, a critic that lives on, consolidation, and resume."""

import functools
from pathlib import Path

import cases
import ppo_cases
import pytest
import runs
import torch
from kills import CutOffError, Kill, run_until_killed
from ppo_stages import MODELS, SAVES, build, train
from transformers import TrainerCallback

from hbat.config.hbat import HBATConfig
from hbat.state.manifest import RunStateError
from hbat.state.plan import part_indices
from hbat.trainer import HBATTrainer

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")


def first_of_each_stage(run, key):
    values = {}
    for entry in run.state.log_history:
        if key in entry:
            values.setdefault(entry["hbat/stage"], entry[key])
    return values


class Kept(TrainerCallback):
    """The critic at both ends of every PPO stage."""

    def __init__(self):
        self.starts, self.ends = [], []

    def _look(self, model):
        return {name: each.detach().clone() for name, each in model.critic.named_parameters()}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if hasattr(model, "critic"):
            self.starts.append(self._look(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if hasattr(model, "critic"):
            self.ends.append(self._look(model))


@pytest.mark.parametrize("case", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_every_stage_starts_with_a_kl_of_zero_from_the_model_as_it_is(case, tmp_path):
    run = train(case, tmp_path)
    assert first_of_each_stage(run, "ppo/kl") == {1: 0.0, 3: 0.0}
    assert any(each != 0.0 for each in runs.logged(run, "ppo/kl"))


@pytest.mark.parametrize(
    ("case", "critic"),
    [
        ("full", "shared"),
        ("lora", "separate"),
        pytest.param("full", "separate", marks=pytest.mark.slow),
        pytest.param("lora", "shared", marks=pytest.mark.slow),
    ],
)
def test_the_critic_lives_on_from_stage_to_stage(case, critic, tmp_path):
    kept = Kept()
    train(case, tmp_path, callbacks=[kept], ppo={"critic": critic})
    assert len(kept.starts) == 2
    trained = [
        name for name in kept.ends[0] if "head" in name or not torch.equal(kept.ends[0][name], kept.starts[0][name])
    ]
    assert trained
    for name in trained:
        assert torch.equal(kept.starts[1][name], kept.ends[0][name])
        assert not torch.equal(kept.starts[1][name], kept.ends[1][name])


@pytest.mark.parametrize(
    ("case", "critic"), [("full", "shared"), pytest.param("lora", "separate", marks=pytest.mark.slow)]
)
def test_the_critic_lives_on_in_a_run_that_continues_another(case, critic, tmp_path):
    rows = {"sft": cases.sft_rows(8), "ppo": ppo_cases.prompts(16)}
    options = {"ppo": {"critic": critic, "adaptive_kl": True, "kl_target": 1e-3, "kl_horizon": 20.0}}
    whole = train(case, tmp_path / "whole", data=rows, **options)
    for number, source in enumerate([None, str(tmp_path / "0")]):
        half = {name: each.select(part_indices(len(each), 2, number, runs.SEED)) for name, each in rows.items()}
        run = train(case, tmp_path / str(number), data=half, num_rounds=1, continue_from=source, **options)
    assert runs.same(cases.weights(run.model), cases.weights(whole.model))
    kept = [runs.state_tensors(tmp_path / name, "kept-ppo") for name in ("whole", "1", "0")]
    assert runs.same(kept[0], kept[1])
    assert not runs.same(kept[1], kept[2])


def test_the_kl_coefficient_lives_on_too(tmp_path):
    run = train("full", tmp_path, ppo={"adaptive_kl": True, "kl_target": 1e-3, "kl_horizon": 20.0})
    first, second, third, _ = runs.logged(run, "ppo/kl_coef")
    assert first == 0.05
    assert second != first
    assert third != first


@pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_consolidation_holds_the_policy_and_never_the_critic(case, tmp_path):
    held = train(case, tmp_path / "held", ewc={"strength": 100.0})
    free = train(case, tmp_path / "free", ewc=None)
    assert max(runs.logged(held, "ewc/penalty")) > 0
    assert not runs.same(cases.weights(held.model), cases.weights(free.model))
    importance = runs.state_tensors(tmp_path / "held", "importance-ppo")
    assert importance
    assert not [name for name in importance if "critic" in name or name.startswith("policy")]


@pytest.mark.parametrize("case", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_run_leaves_the_model_as_it_was_built(case, tmp_path):
    model = MODELS[case](0)
    hooks = sum(len(module._forward_hooks) for module in model.modules())  # noqa: SLF001
    dropout = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    run = build(model, tmp_path)
    run.train()
    assert run.model is model
    assert set(getattr(model, "peft_config", {})) <= {"default"}
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks  # noqa: SLF001
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == dropout
    assert "forward" not in vars(model)


def test_attention_dropout_is_off_in_ppo_and_back_in_the_next_stage(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            attention = getattr(model, "policy", model).model.layers[0].self_attn
            seen.setdefault(type(model).__name__, set()).add(attention.attention_dropout)

    run = build(cases.tiny_llama(0, dropout=0.25), tmp_path, callbacks=[Look()])
    run.train()
    assert seen == {"LlamaForCausalLM": {0.25}, "PolicyAndCritic": {0.0}}
    assert first_of_each_stage(run, "ppo/kl") == {1: 0.0, 3: 0.0}


def test_evaluation_puts_the_reward_into_the_table_and_higher_is_better(tmp_path):
    evaluation = {"sft": cases.sft_rows(2, 1), "ppo": ppo_cases.prompts(3)}
    run = train("full", tmp_path, evaluation=evaluation)
    rewards = run.matrix.series("ppo")
    assert len(rewards) == 5
    assert rewards[0] == pytest.approx(
        build(cases.tiny_llama(0), tmp_path / "x", evaluation=evaluation).evaluate()["ppo"]["reward"]
    )
    losses = run.matrix.series("sft")
    assert run.matrix.backward_transfer() == {"sft": losses[-2] - losses[-1]}
    assert run.matrix.forgetting()["ppo"] == max(rewards[1:-1]) - rewards[-1]


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return functools.cache(lambda case: train(case, tmp_path_factory.mktemp("whole")))


def log(run):
    return [
        {key: each[key] for key in each if not key.endswith("num_tokens") and "seconds/" not in key}
        for each in run.state.log_history
    ]


def assert_equal(run, folder, expected):
    assert runs.same(cases.weights(run.model), cases.weights(expected.model))
    assert log(run) == log(expected)
    critic = runs.state_tensors(Path(expected.args.output_dir), "kept-ppo")
    assert critic["critic.head.weight"].abs().max() > 0
    assert runs.same(runs.state_tensors(folder, "kept-ppo"), critic)


CUTS = {
    "between stages": (Kill(2, "begin"), {}),
    "in the first PPO stage": (Kill(1, "step", 5), {}),
    "in the second, with a checkpoint in the middle of a rollout": (Kill(3, "step", 7), {"ppo": SAVES}),
    "at the end of a stage with a checkpoint": (Kill(3, "step", 8), {"ppo": SAVES | {"save_steps": 4}}),
}


def _cuts():
    """Each cut and each model; outside of `make test-all` the cuts with a checkpoint, and the models take turns."""
    for number, cut in enumerate(CUTS):
        for turn, case in enumerate(MODELS):
            marks = [pytest.mark.slow] if number < 2 or number % len(MODELS) != turn else []
            yield pytest.param(case, *CUTS[cut], id=f"{cut}-{case}", marks=marks)


@pytest.mark.parametrize(("case", "kill", "options"), list(_cuts()))
def test_a_run_that_was_cut_off_ends_as_if_it_was_not(case, kill, options, whole, tmp_path):
    kill.current = -1
    with pytest.raises(CutOffError):
        train(case, tmp_path, callbacks=[kill], **options)
    assert_equal(train(case, tmp_path, resume=True, **options), tmp_path, whole(case))


PROGRAM = """
import kills, ppo_stages
ppo_stages.train("full", sys.argv[1], callbacks=[kills.KillProcess(3, "step", 5)], ppo=ppo_stages.SAVES)
"""


@pytest.mark.slow  # `trainer/test_resume.py` has one with SFT and DPO
def test_a_process_that_was_killed_resumes_in_another(whole, tmp_path):
    run_until_killed(PROGRAM, tmp_path)
    assert_equal(train("full", tmp_path, resume=True, ppo=SAVES), tmp_path, whole("full"))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_parts_smaller_than_a_rollout_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset\['ppo'\].*7.*4"):
        build(cases.tiny_llama(0), tmp_path, rows=7)


def test_a_prompt_of_a_later_round_that_is_too_long_is_refused_before_the_first(tmp_path):
    rows = ppo_cases.prompts(16)
    long = rows.map(lambda row, number: {"prompt": "x" * 130 if number == 13 else row["prompt"]}, with_indices=True)
    sizes = {key: value for key, value in ppo_cases.SIZES.items() if key != "max_steps"}
    config = HBATConfig(output_dir=str(tmp_path), objectives=["ppo"], num_rounds=4, ppo=runs.section(**sizes))
    for trained, held_out in ((long, rows), (rows, long)):
        with pytest.raises(ValueError, match="row 13, field `prompt`: it has 130 tokens, but with `max_comp"):
            HBATTrainer(
                cases.tiny_llama(0),
                config,
                {"ppo": trained},
                {"ppo": held_out},
                processing_class=cases.tiny_tokenizer(),
                reward_funcs=ppo_cases.letters,
            )
    assert not list(tmp_path.iterdir())


def test_a_run_without_rewards_is_refused(tmp_path):
    config = HBATConfig(output_dir=str(tmp_path), objectives=["ppo"], ppo=runs.section())
    with pytest.raises(ValueError, match="reward_funcs"):
        HBATTrainer(cases.tiny_llama(0), config, {"ppo": ppo_cases.prompts()}, processing_class=cases.tiny_tokenizer())


def test_a_run_is_not_resumed_with_another_critic(tmp_path):
    with pytest.raises(CutOffError):
        train("full", tmp_path, callbacks=[Kill(0, "begin")])
    with pytest.raises(RunStateError, match=r"ppo\.critic: 'shared' -> 'separate'"):
        train("full", tmp_path, resume=True, ppo={"critic": "separate"})


class FailOnce(TrainerCallback):
    """A PPO stage that is not finite at its first try, and the learning rates with which each try begins."""

    def __init__(self):
        self.rates = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if hasattr(model, "critic"):
            self.rates.append({group["initial_lr"] for group in optimizer.param_groups})
            if len(self.rates) == 1:
                raise FloatingPointError("made up")


def test_a_stage_that_is_rolled_back_halves_the_critics_learning_rate_as_well(tmp_path):
    tries = FailOnce()
    ppo = {"critic_learning_rate": 0.04, "max_steps": 1}
    train("full", tmp_path, num_rounds=1, on_nan="rollback", callbacks=[tries], sft={"max_steps": 1}, ppo=ppo)
    assert tries.rates == [{0.05, 0.04}, {0.025, 0.02}]
