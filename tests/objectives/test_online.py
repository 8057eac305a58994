"""GRPO and RLOO as objectives of a run: their reference, their rollouts, their rewards, and going on after a cut."""

import copy

import cases
import online_runs
import ppo_cases
import pytest
import runs
import torch
import trl
from kills import CutOffError, Kill
from launched import BEFORE_5
from transformers import LlamaForSequenceClassification

from hbat.objectives.online import GRPO, RLOO, OnlineStage
from hbat.ppo.rewards.function import RewardError

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

each_objective = pytest.mark.parametrize("name", ["grpo", "rloo"])
#: Each model and each objective once; the other two pairs are slow, as the objectives differ in their loss alone.
each_pair = pytest.mark.parametrize(
    ("case", "name"),
    [
        ("full", "grpo"),
        ("lora", "rloo"),
        pytest.param("full", "rloo", marks=pytest.mark.slow),
        pytest.param("lora", "grpo", marks=pytest.mark.slow),
    ],
)
MAKE = {"grpo": GRPO, "rloo": RLOO}


# --- the reference policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("full", "grpo", {"bf16": True}),
        ("lora", "rloo", {}),
        pytest.param("full", "rloo", {"bf16": True}, marks=pytest.mark.slow),
        pytest.param("lora", "grpo", {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_every_stage_starts_at_its_reference(case, options, name, tmp_path):
    run = online_runs.train(cases.MODEL_CASES[case](0), tmp_path, name, options=options)
    divergence = runs.logged(run, f"{name}/kl")
    assert len(divergence) == 4
    assert divergence[::2] == [0.0, 0.0]
    assert all(each != 0 for each in divergence[1::2])


def built(objective, folder, reference):
    return objective.trainer_class(
        model=cases.tiny_llama(),
        args=objective.stage_args(objective.base_args(str(folder)), str(folder), 0),
        train_dataset=online_runs.prompts(4),
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=online_runs.variety,
        ref_model=reference,
    )


@each_objective
def test_a_full_model_gets_the_very_reference_that_is_there(name, tmp_path):
    reference = cases.tiny_llama(seed=1)
    module = {"grpo": trl.trainer.grpo_trainer, "rloo": trl.trainer.rloo_trainer}[name]
    loader = module.create_model_from_path
    trainer = built(MAKE[name](config=online_runs.section()), tmp_path, reference)
    assert trainer.ref_model is reference
    assert module.create_model_from_path is loader


def test_a_trl_that_does_not_take_the_reference_is_refused(tmp_path):
    class OtherGRPOTrainer(trl.GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ref_model = cases.tiny_llama(seed=2)

    class StageTrainer(OnlineStage, OtherGRPOTrainer):
        pass

    objective = GRPO(config=online_runs.section(), trainer_class=StageTrainer)
    with pytest.raises(NotImplementedError, match="does not take the reference policy that it is given"):
        built(objective, tmp_path, cases.tiny_llama(seed=1))


def test_only_a_penalty_for_divergence_needs_a_reference(tmp_path):
    assert not GRPO().uses_reference
    assert not GRPO(config={"learning_rate": 0.1}).uses_reference
    assert GRPO(config={"beta": 0.01}).uses_reference
    assert RLOO().uses_reference
    assert not RLOO(config={"beta": 0.0}).uses_reference
    assert not GRPO(config=trl.GRPOConfig(output_dir=str(tmp_path), bf16=False, beta=0.0)).uses_reference


# --- consolidation, and what a stage leaves --------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), [("lora", "grpo"), pytest.param("full", "rloo", marks=pytest.mark.slow)])
def test_consolidation_acts_on_a_stage(case, name, tmp_path):
    model = cases.MODEL_CASES[case]
    held = online_runs.train(model(0), tmp_path / "held", name, ewc={"strength": 20.0})
    free = online_runs.train(model(0), tmp_path / "free", name)
    penalties = [each[f"{name}/ewc/penalty"] for each in held.state.log_history if f"{name}/loss" in each]
    assert [each > 0 for each in penalties] == [False, True, False, True]
    assert cases.largest_difference(cases.weights(held.model), cases.weights(free.model)) > 1e-5


def marks(model):
    """What trainers are known to leave on a model, module by module."""
    found = {}
    for name, module in model.named_modules():
        own = sorted(key for key in ("forward", "_original_forward", "_is_accelerate_prepared") if key in vars(module))
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        found[name] = (own, hooks, module.training)
    return found


@each_pair
def test_a_stage_leaves_nothing_on_the_model(case, name, tmp_path):
    model = cases.MODEL_CASES[case](0)
    run = online_runs.build_run(model, tmp_path, name, ewc={"strength": 1.0}, evaluation=True)
    before = marks(model), copy.deepcopy(model.generation_config.__dict__), model.config.use_cache
    grad = {key: each.requires_grad for key, each in model.named_parameters()}
    run.train()
    assert (marks(model), model.generation_config.__dict__, model.config.use_cache) == before
    assert {key: each.requires_grad for key, each in model.named_parameters()} == grad
    assert list(getattr(model, "peft_config", {"default": None})) == ["default"]


def test_a_fisher_importance_has_no_sequences_to_look_at(tmp_path):
    with pytest.raises(ValueError, match=r"`ewc.source: fisher` needs the sequences of the objective 'grpo'"):
        online_runs.build_run(cases.tiny_llama(), tmp_path, "grpo", ewc={"source": "fisher"})


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), [("full", "grpo"), pytest.param("lora", "rloo", marks=pytest.mark.slow)])
def test_the_reward_after_every_stage_is_the_score_and_higher_is_better(case, name, tmp_path):
    model = cases.MODEL_CASES[case]
    run = online_runs.train(model(0), tmp_path / "with", name, evaluation=True)
    scores = run.matrix.series(name)
    assert len(scores) == 5
    assert all(each > 0 for each in scores)
    assert run.matrix.better == {"sft": "lower", name: "higher"}
    assert run.matrix.rows[0]["scores"][name]["kl"] == 0
    assert run.evaluate()[name]["reward"] == scores[-1]
    without = online_runs.train(model(0), tmp_path / "without", name)
    assert runs.same(cases.weights(run.model), cases.weights(without.model))


def test_evaluation_batches_that_tear_groups_apart_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"`per_device_eval_batch_size` makes batches of 3 .* not a multiple of 2"):
        online_runs.build_run(
            cases.tiny_llama(), tmp_path, "grpo", options={"per_device_eval_batch_size": 3}, evaluation=True
        )


# --- rollouts --------------------------------------------------------------------------------------------------------

#: Fields that decide about rollouts, with the number of prompts in one.
ROLLOUTS = {
    "one step each": ({}, 2),
    "used twice": ({"num_iterations": 2}, 2),
    "over two steps": ({"steps_per_generation": 2}, 4),
    "by size": ({"generation_batch_size": 12}, 6),
    "accumulated": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 2),
    "accumulated unevenly": ({"gradient_accumulation_steps": 3, "steps_per_generation": 1}, 2),
    "two epochs": ({"num_train_epochs": 2, "num_generations": 4}, 1),
}


@pytest.mark.parametrize("name", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("options", "prompts"), ROLLOUTS.values(), ids=ROLLOUTS)
def test_rows_and_steps_of_a_stage_are_those_of_the_host(options, prompts, name, tmp_path):
    options = {"max_steps": -1, "max_completion_length": 2} | options
    run = online_runs.build_run(cases.tiny_llama(), tmp_path, name, options=options, objectives=[name], num_rounds=1)
    expected = run.estimated_steps(name)
    run.train()
    assert run.state.global_step == expected
    assert MAKE[name]().minimum_rows(run.tracks[name].args) == prompts


def test_too_few_prompts_for_a_rollout_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="too few rows: 8 for 2 rounds; every round needs at least 8 rows"):
        online_runs.build_run(cases.tiny_llama(), tmp_path, "grpo", options={"steps_per_generation": 4})


def test_prompts_are_checked_row_by_row(tmp_path):
    run = online_runs.build_run
    with pytest.raises(ValueError, match=r"`grpo\.cast_lm_head_to_fp32` cannot be set here"):
        run(cases.tiny_llama(), tmp_path, "grpo", options={"cast_lm_head_to_fp32": True})
    objective = GRPO()
    assert [fault.kind for fault in objective.row_check()({"prompt": " "})] == ["empty text"]


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_folder(tmp_path):
    """A reward model on disk with its tokenizer."""
    folder = tmp_path / "reward"
    config = cases.tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_reward_model_stays_as_it_is(name, reward_folder, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(reward_folder)
    before, weights = marks(model), {key: each.clone() for key, each in model.state_dict().items()}
    run = online_runs.train(cases.tiny_llama(), tmp_path / "run", name, rewards=[model, online_runs.variety])
    assert marks(model) == before
    assert all(torch.equal(each, weights[key]) for key, each in model.state_dict().items())
    assert len(runs.logged(run, f"{name}/rewards/reward/mean")) == 4


@pytest.mark.parametrize("name", ["rloo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_reward_model_is_given_by_name_as_well(name, reward_folder, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(reward_folder)
    by_name = online_runs.train(cases.tiny_llama(), tmp_path / "name", name, rewards=str(reward_folder), num_rounds=1)
    given = online_runs.train(cases.tiny_llama(), tmp_path / "model", name, rewards=model, num_rounds=1)
    assert runs.same(cases.weights(by_name.model), cases.weights(given.model))
    assert len(runs.logged(by_name, f"{name}/rewards/reward/mean")) == 2


@each_objective
def test_a_language_model_in_place_of_a_reward_model_is_refused_before_training(name, tmp_path):
    model = cases.tiny_llama()
    model.config.num_labels = 1
    cases.tiny_tokenizer().save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")  # noqa: SLF001 - transformers has no public name
    with pytest.raises(ValueError, match="'model', a LlamaForCausalLM, is a language model"):
        online_runs.build_run(cases.tiny_llama(), tmp_path / "run", name, rewards=model, objectives=[name])


def nothing(completions, **columns):
    return [None] * len(completions)


def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)


async def nothing_later(completions):
    return nothing(completions)


def nothing_more(completions):
    return [None] * (len(completions) - 1) + [1.0]


@each_objective
def test_completions_to_which_no_reward_applies_are_an_error_if_there_are_no_others(name, tmp_path):
    def train(folder, *rewards):
        options = {"objectives": [name], "num_rounds": 1, "options": {"max_steps": 1}}
        return online_runs.train(cases.tiny_llama(), tmp_path / folder, name, rewards=[*rewards], **options)

    with pytest.raises(RewardError, match=r"\(nothing, nothing_later\) returned None or NaN for 4 of 4 rows"):
        train("none", nothing, nothing_later)
    # transformers below 5 comes with a TRL that counts the other three as zero.
    assert runs.logged(train("some", nothing, nothing_more), f"{name}/reward") == [0.25 if BEFORE_5 else 1.0]


@pytest.mark.parametrize(("name", "conversational"), [("grpo", False), ("grpo", True), ("rloo", True)])
def test_a_reward_and_the_log_of_completions_have_the_space_between_prompt_and_completion(
    name, conversational, tmp_path
):
    spaces, objective = ppo_cases.Spaces(), MAKE[name](config=online_runs.section(max_steps=1, beta=0.0))
    trainer = objective.trainer_class(
        model=cases.tiny_llama(),
        args=objective.stage_args(objective.base_args(str(tmp_path)), str(tmp_path), 0),
        train_dataset=ppo_cases.spaced_prompts(conversational=conversational),
        processing_class=cases.spaced_tokenizer(),
        reward_funcs=spaces,
    )
    trainer.train()
    assert spaces.right
    assert any(spaces.texts)
    shown = trainer._logs["completion"]  # noqa: SLF001 - what `log_completions` prints
    if not BEFORE_5:  # TRL then decoded completions for its log by themselves
        assert [each[0]["content"] if conversational else each for each in shown] == spaces.texts


#: Fields of the section of every objective that takes rewards.
CHEAP = {"grpo": online_runs.ROLLOUT, "rloo": online_runs.ROLLOUT, "ppo": {"max_completion_length": 6}}


@pytest.mark.parametrize("name", CHEAP)
def test_a_column_that_a_reward_needs_is_missed_before_training(name, tmp_path):
    def accuracy(completions, solution):
        raise AssertionError

    config = {"objectives": [name], name: runs.section(**CHEAP[name])}
    with pytest.raises(ValueError, match=r"'accuracy' needs \['solution'\], but the columns .* are \['answer'\]"):
        online_runs.build_run(cases.tiny_llama(), tmp_path, name, rewards=accuracy, **config)


def broken(completions, **columns):
    return [completion["score"] for completion in completions]


@pytest.mark.parametrize(
    ("reward", "says"), [(broken, "raised TypeError"), (not_a_number, "returned nan of type float")]
)
@pytest.mark.parametrize("name", CHEAP)
def test_a_reward_that_fails_is_found_before_training(name, reward, says, tmp_path):
    config = {"objectives": [name], name: runs.section(**CHEAP[name])}
    with pytest.raises(ValueError, match=rf"The trainer of '{name}' .* The reward '{reward.__name__}' {says}"):
        online_runs.build_run(cases.tiny_llama(), tmp_path, name, rewards=reward, **config)


def test_a_reward_gets_from_ppo_what_it_gets_from_trl(tmp_path):
    given = {}

    for name, cheap in CHEAP.items():

        def reward(completions, name=name, **others):
            given[name] = set(others)
            return [0.0] * len(completions)

        config = {"objectives": [name], "num_rounds": 1, name: runs.section(max_steps=1, **cheap)}
        online_runs.train(cases.tiny_llama(), tmp_path / name, name, rewards=reward, **config)
    assert given["grpo"] == given["rloo"] == given["ppo"]
    assert given["ppo"] >= {"log_metric", "log_extra", "trainer_state", "answer"}


def test_rewards_see_the_other_columns_of_a_row_and_a_stage_without_divergence_has_no_reference(tmp_path):
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.extend(answer)
        return [0.0] * len(prompts)

    run = online_runs.train(cases.tiny_llama(), tmp_path, "grpo", rewards=reward, num_rounds=1, options={"beta": 0.0})
    assert runs.logged(run, "grpo/kl") == []
    assert set(seen) <= set(online_runs.prompts(8)["answer"])
    assert seen


def test_a_run_is_not_resumed_with_other_rewards(tmp_path):
    def other(completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(CutOffError):
        online_runs.train(cases.tiny_llama(), tmp_path, "grpo", callbacks=[Kill(0, "begin")])
    with pytest.raises(ValueError, match=r"run\.rewards\.grpo: \['variety'\] -> \['other'\]"):
        online_runs.train(cases.tiny_llama(), tmp_path, "grpo", resume=True, rewards=other)


# --- going on after a cut --------------------------------------------------------------------------------------------

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_steps": 4}
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
#: Where the run is cut off, and the step from which its stage goes on.
CUTS = {
    "between stages": (Kill(2, "begin"), {}, 0),
    "inside, between rollouts": (Kill(1, "step", 3), {"num_iterations": 2}, 2),
    "inside a rollout": (Kill(1, "step", 2), {"num_iterations": 2}, 0),
    "in the second epoch": (Kill(1, "step", 4), {}, 1),
}


#: Each cut and each model once with one of the two, which differ in their loss alone; the rest is slow.
QUICK = {
    ("grpo", "full", "inside, between rollouts"), ("grpo", "lora", "inside a rollout"),
    ("rloo", "full", "in the second epoch"),
}  # fmt: skip
RESUMED = [("full", each) for each in CUTS] + [("lora", "between stages"), ("lora", "inside a rollout")]


@pytest.mark.parametrize(
    ("name", "case", "cut"),
    [
        pytest.param(name, *each, marks=[] if (name, *each) in QUICK else pytest.mark.slow)
        for name in ("grpo", "rloo")
        for each in RESUMED
    ],
)
def test_a_run_that_was_cut_off_ends_as_if_it_was_not(case, cut, name, tmp_path):
    killer, options, resumes_at = CUTS[cut]
    killer.current = -1
    settings = {"options": ADAM | options, "sft": runs.section(max_steps=1), "ewc": {"strength": 1.0}}
    settings["num_rounds"] = 1 if "rollout" in cut else 2
    expected = online_runs.train(cases.MODEL_CASES[case](0), tmp_path / "whole", name, **settings)
    settings["options"] = settings["options"] | SAVES
    with pytest.raises(CutOffError):
        online_runs.train(cases.MODEL_CASES[case](0), tmp_path / "cut", name, callbacks=[killer], **settings)
    begun = Began()
    resumed = online_runs.train(
        cases.MODEL_CASES[case](0), tmp_path / "cut", name, resume=True, callbacks=[begun], **settings
    )
    assert begun.steps[0] == resumes_at
    assert runs.same(cases.weights(resumed.model), cases.weights(expected.model))


class Began(Kill):
    """Notes the step at which each stage begins."""

    def __init__(self):
        super().__init__(-1, "never")
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
