"""PPOTrainer takes the right step, whatever the batches, the precision and the adapters, and what it adds to it."""

import asyncio
import math

import cases
import ppo_cases
import pytest
import runs
import torch
from ppo_cases import build, logged, trained
from scorers import tiny_scorer
from transformers import AutoModelForCausalLM, TrainerCallback

from hbat.engines.checks import policy_of
from hbat.ewc.callback import EWCCallback
from hbat.ewc.parameters import snapshot, trainable_parameters
from hbat.ewc.penalty import ewc_penalty
from hbat.ppo.rewards.rewards import RewardError
from hbat.ppo.trainer import PPOTrainer

CHECKPOINTING = next(key for key in cases.CHEAP_ARGS if key.endswith("checkpointing"))
both_models = pytest.mark.parametrize("make", [cases.tiny_llama, cases.lora_llama], ids=["full", "lora"])
slowly_both_models = pytest.mark.parametrize(
    "make",
    [pytest.param(cases.tiny_llama, id="full"), pytest.param(cases.lora_llama, id="lora", marks=pytest.mark.slow)],
)


def run(make, folder, **options):
    trainer = build(make(0), folder, **options)
    trainer.train()
    return trainer


# --- what rewards log ------------------------------------------------------------------------------------------------


def test_a_reward_adds_to_the_log_of_training_and_evaluation(tmp_path):
    calls = []

    def reward(completions, log_metric, log_extra):
        calls.append(len(calls))
        log_extra("number", [0] * len(completions))
        log_metric("calls", calls[-1])
        log_metric(name="calls", value=calls[-1] + 2)
        log_metric("reward", 100.0)
        return [0.0] * len(completions)

    trainer = build(
        cases.tiny_llama(0), tmp_path, reward_funcs=reward, logging_steps=8, eval_dataset=ppo_cases.prompts(4)
    )
    trainer.train()
    assert (logged(trainer, "calls"), logged(trainer, "reward")) == ([1.5], [0.0])
    assert trainer.evaluate()["eval_calls"] == 3.0


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_sees_the_space_between_prompt_and_completion(conversational, tmp_path):
    spaces = ppo_cases.Spaces()
    PPOTrainer(
        cases.tiny_llama(0),
        ppo_cases.arguments(tmp_path, max_steps=1),
        ppo_cases.spaced_prompts(conversational=conversational),
        processing_class=cases.spaced_tokenizer(),
        reward_funcs=spaces,
    ).train()
    assert spaces.right
    assert any(spaces.texts)


# --- the step --------------------------------------------------------------------------------------------------------


class Recorded(PPOTrainer):
    """Keeps the rollouts that were made."""

    def __init__(self, *args, **kwargs):
        self.rollouts = []
        super().__init__(*args, **kwargs)

    def _make_rollout(self, number):
        super()._make_rollout(number)
        self.rollouts.append(self._progress.rollout)


def plain_statistics(model, head, prompt, completion):
    """Log-probabilities and values of one completion, alone and without padding, in float64."""
    ids = torch.tensor([prompt + completion])
    output = model(input_ids=ids, output_hidden_states=True)
    first = len(prompt) - 1
    log_probs = torch.log_softmax(output.logits[0, first:-1], -1)
    chosen = torch.stack([log_probs[position, token] for position, token in enumerate(completion)])
    return chosen, head(output.hidden_states[-1][0, first:-1]).squeeze(-1)


def sequences_of(rollout):
    for row in range(rollout.prompt_ids.shape[0]):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
        yield prompt, rollout.completion_ids[row][rollout.completion_mask[row]].tolist()


#: Of the step that is worked out by hand: one mini-batch of all rows, plain gradient descent.
KL, VALUE, GAMMA, LAMBDA, RATE = 0.3, 0.7, 0.9, 0.8, 0.5
BY_HAND = {
    "kl_coef": KL, "vf_coef": VALUE, "gamma": GAMMA, "lam": LAMBDA, "learning_rate": RATE, "max_grad_norm": 0.0,
    "weight_decay": 0.0, "num_ppo_epochs": 1, "per_device_train_batch_size": 4, "max_steps": 1,
}  # fmt: skip


def scores_by_hand(sequences):
    texts, rows = cases.tiny_tokenizer(), ppo_cases.prompts()
    of_prompt = {tuple(texts(row["prompt"])["input_ids"]): row for row in rows}
    for prompt, completion in sequences:
        row = of_prompt[tuple(prompt)]
        text = texts.decode(completion, skip_special_tokens=True)
        yield from ppo_cases.letters([row["prompt"]], [text], [completion], [row["target"]])


def advantages_by_hand(old, pulled, values, score):
    rewards = [-KL * float(a - b) for a, b in zip(old, pulled, strict=True)]
    rewards[-1] += score
    ahead, advantages = 0.0, []
    for step in reversed(range(len(rewards))):
        following = float(values[step + 1]) if step + 1 < len(rewards) else 0.0
        ahead = rewards[step] + GAMMA * following - float(values[step]) + GAMMA * LAMBDA * ahead
        advantages.insert(0, ahead)
    return advantages


def loss_by_hand(model, head, reference, sequences):
    scores, episodes = scores_by_hand(sequences), []
    for (prompt, completion), score in zip(sequences, scores, strict=True):
        with torch.no_grad():
            old, before = plain_statistics(model, head, prompt, completion)
            pulled, _ = plain_statistics(reference, head, prompt, completion)
        episodes.append((prompt, completion, old, before, advantages_by_hand(old, pulled, before, score)))
    flat = [each for episode in episodes for each in episode[4]]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((each - mean) ** 2 for each in flat) / (len(flat) - 1))
    losses = []
    for prompt, completion, old, before, advantages in episodes:
        log_probs, values = plain_statistics(model, head, prompt, completion)
        for step, advantage in enumerate(advantages):
            white, target = (advantage - mean) / spread, advantage + float(before[step])
            ratio = torch.exp(log_probs[step] - old[step])
            clipped = before[step] + (values[step] - before[step]).clamp(-0.2, 0.2)
            surrogate = -torch.min(white * ratio, white * ratio.clamp(0.8, 1.2))
            losses.append(surrogate + VALUE * 0.5 * torch.max((values[step] - target) ** 2, (clipped - target) ** 2))
    return torch.stack(losses).mean()


def test_a_step_is_the_gradient_of_the_loss_worked_out_by_hand(tmp_path):
    trainer = build(cases.tiny_llama(0), tmp_path, kind=Recorded, ref_model=cases.tiny_llama(7), **BY_HAND)
    with torch.no_grad():
        trainer.model.critic.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    model, head = cases.tiny_llama(0).double(), torch.nn.Linear(32, 1).double()
    head.load_state_dict(trainer.model.critic.head.state_dict())
    trainer.train()

    sequences = list(sequences_of(trainer.rollouts[0]))
    loss_by_hand(model, head, cases.tiny_llama(7).double(), sequences).backward()
    expected = {name: each - RATE * each.grad for name, each in cases.trainable(model).items()}
    got = {name: each.double() for name, each in cases.trainable(trainer.policy).items()}
    assert cases.largest_difference(got, cases.weights(cases.tiny_llama(0))) > 1e-2
    assert cases.largest_difference(got, expected) < 2e-5
    assert torch.allclose(trainer.model.critic.head.weight.double(), head.weight - RATE * head.weight.grad, atol=2e-5)


@slowly_both_models
def test_micro_batches_add_up_to_the_whole_batch(make, tmp_path):
    whole = run(make, tmp_path / "whole", per_device_train_batch_size=4, max_steps=4)
    parts = run(make, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=4)
    assert cases.largest_difference(trained(whole), trained(parts)) < 1e-5
    assert logged(whole, "loss") == pytest.approx(logged(parts, "loss"), abs=1e-5)
    assert logged(whole, "loss/policy") == pytest.approx(logged(parts, "loss/policy"), abs=1e-5)


def test_how_rows_are_batched_for_generation_and_scoring_changes_nothing_in_greedy_rollouts(tmp_path):
    greedy = {"top_k": 1, "max_steps": 5}
    whole = run(cases.tiny_llama, tmp_path / "whole", **greedy)
    parts = run(cases.tiny_llama, tmp_path / "parts", **greedy, generation_batch_size=3, scoring_batch_size=1)
    assert cases.largest_difference(trained(whole), trained(parts)) < 1e-5


def test_the_gradient_is_clipped(tmp_path):
    trainer = build(
        cases.tiny_llama(0), tmp_path, max_steps=1, max_grad_norm=1e-3, learning_rate=1.0, weight_decay=0.0
    )
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    length = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in after))
    assert length == pytest.approx(1e-3, rel=1e-2)
    assert logged(trainer, "grad_norm")[0] > 1e-2


@pytest.mark.parametrize(
    ("make", "critic"),
    [(cases.tiny_llama, "shared"), (cases.lora_llama, "separate")],
    ids=["full model with a shared critic", "adapter with a separate critic"],
)
def test_recomputing_activations_gives_the_same_weights(make, critic, tmp_path):
    kept = run(make, tmp_path / "kept", critic=critic, max_steps=5)
    again = run(make, tmp_path / "again", critic=critic, max_steps=5, **{CHECKPOINTING: True})
    assert cases.largest_difference(trained(kept), trained(again)) < 1e-6


def test_layers_compute_in_bfloat16_when_asked_and_weights_stay_float32(tmp_path):
    seen = set()

    def look(module, inputs, output):
        seen.add((module.training, output.dtype))

    model = cases.tiny_llama(0)
    model.model.layers[0].mlp.up_proj.register_forward_hook(look)
    trainer = build(model, tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert seen >= {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {each.dtype for each in trainer.model.parameters()} == {torch.float32}
    assert logged(trainer, "kl")[0] == 0.0


@both_models
def test_the_first_kl_is_zero_and_the_first_ratio_one(make, tmp_path):
    trainer = run(make, tmp_path, max_steps=5)
    assert logged(trainer, "kl")[0] == 0.0
    assert logged(trainer, "kl")[-1] != 0.0
    assert logged(trainer, "update/ratio")[0] == pytest.approx(1.0, abs=1e-6)


def test_dropout_is_off(tmp_path):
    trainer = run(lambda seed: cases.lora_llama(seed, dropout=0.5), tmp_path, max_steps=1)
    assert logged(trainer, "kl")[0] == 0.0
    assert logged(trainer, "update/ratio")[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_an_adapter_is_trained_and_nothing_else_of_the_model(critic, tmp_path):
    model = cases.lora_llama(0)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    trainer = build(model, tmp_path, critic=critic, max_steps=2)
    trainer.train()
    after = {name: each for name, each in trainer.policy.named_parameters() if ".ref." not in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".default." in name for name in changed)
    assert trainer.ref_model is None


def test_a_shared_critic_adds_a_head_and_no_more(tmp_path):
    trainer = build(cases.lora_llama(0), tmp_path)
    assert {name: tuple(each.shape) for name, each in trainer.model.critic.named_parameters()} == {
        "head.weight": (1, 32),
        "head.bias": (1,),
    }


def test_a_separate_critic_leaves_the_policys_gradient_alone(tmp_path):
    options = {"max_steps": 2, "max_grad_norm": 0.0, "weight_decay": 0.0, "critic": "separate"}
    small = run(cases.tiny_llama, tmp_path / "small", vf_coef=0.0, **options)
    large = run(cases.tiny_llama, tmp_path / "large", vf_coef=9.0, **options)
    assert cases.largest_difference(cases.weights(small.policy), cases.weights(large.policy)) < 1e-7
    assert cases.largest_difference(cases.weights(small.model.critic), cases.weights(large.model.critic)) > 1e-3


def test_a_critic_of_a_model_on_disk(tmp_path):
    tiny_scorer(vocabulary=cases.VOCABULARY_SIZE).save_pretrained(tmp_path / "scorer")
    cases.tiny_tokenizer().save_pretrained(tmp_path / "scorer")
    options = {"critic": "separate", "critic_model_name_or_path": str(tmp_path / "scorer"), "max_steps": 2}
    trainer = run(cases.tiny_llama, tmp_path, **options)
    assert all(math.isfinite(each) for each in logged(trainer, "loss/value"))


def test_a_critic_that_does_not_know_the_policys_tokens_is_refused(tmp_path):
    tiny_scorer(vocabulary=20).save_pretrained(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"20 token embeddings, but the policy's vocabulary has 261"):
        build(cases.tiny_llama(0), tmp_path, critic="separate", critic_model_name_or_path=str(tmp_path / "scorer"))


def test_the_critic_has_its_own_learning_rate(tmp_path):
    trainer = build(cases.tiny_llama(0), tmp_path, critic_learning_rate=0.0, weight_decay=0.0, max_steps=2)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("critic."))
    assert not torch.equal(before["policy.lm_head.weight"], after["policy.lm_head.weight"])


# --- options ---------------------------------------------------------------------------------------------------------


def test_updates_beyond_the_target_kl_change_nothing(tmp_path):
    class Weights(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(cases.weights(kwargs["model"]))

    weights = Weights()
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "num_ppo_epochs": 4, "callbacks": [weights]}
    trainer = build(cases.tiny_llama(0), tmp_path, target_kl=1e-9, **options)
    trainer.train()
    still = [
        cases.largest_difference(before, after) == 0.0
        for before, after in zip(weights.seen, weights.seen[1:], strict=False)
    ]
    # Of the 8 steps of a rollout the second moves the policy off the one that sampled and is seen to.
    assert still == [False, True, True, True, True, True, True]
    assert logged(trainer, "update/stopped") == [0.0, 1.0]
    assert trainer.state.global_step == 8


def test_the_kl_coefficient_moves_towards_its_target(tmp_path):
    options = {"adaptive_kl": True, "kl_coef": 0.1, "kl_horizon": 40.0}
    up = run(cases.tiny_llama, tmp_path / "up", kl_target=1e-6, max_steps=12, **options)
    down = run(cases.tiny_llama, tmp_path / "down", kl_target=1e6, **options)
    # The first rollout's KL is 0, below any target.
    assert logged(down, "kl_coef") == pytest.approx([0.1, 0.1 * (1 - 0.2 * 4 / 40)])
    assert logged(up, "kl_coef")[-1] != logged(down, "kl_coef")[-1]


def test_an_entropy_bonus_keeps_the_policy_broader(tmp_path):
    without = run(cases.tiny_llama, tmp_path / "without", max_steps=12)
    bonus = run(cases.tiny_llama, tmp_path / "bonus", max_steps=12, entropy_coef=1.0)
    assert logged(bonus, "entropy")[-1] > logged(without, "entropy")[-1]


def test_completions_that_do_not_end_are_penalised(tmp_path):
    def nothing(prompts, completions, **kwargs):
        return [0.0] * len(completions)

    options = {"reward_funcs": nothing, "kind": Recorded, "kl_coef": 0.0, "whiten_advantages": False, "gamma": 1.0}
    trainer = run(
        cases.tiny_llama, tmp_path, missing_eos_penalty=3.0, max_completion_length=3, lam=1.0, max_steps=1, **options
    )
    rollout = trainer.rollouts[0]  # the critic gives zero, so an advantage is the reward to come
    ended = (rollout.completion_ids == 1).any(1)
    assert rollout.advantages[:, 0].tolist() == [0.0 if each else -3.0 for each in ended]
    assert not ended.all()


def test_without_a_kl_penalty_there_is_no_reference(tmp_path):
    trainer = run(cases.tiny_llama, tmp_path, kl_coef=0.0)
    assert trainer.ref_model is None
    assert logged(trainer, "kl") == [0.0, 0.0]


def test_conversations_get_the_chat_template(tmp_path):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(each[0]["content"])) for each in completions]

    rows = ppo_cases.prompts(conversational=True)
    trainer = build(cases.tiny_llama(0), tmp_path, kind=Recorded, rows=rows, reward_funcs=reward, max_steps=1)
    trainer.train()
    prompt, _ = next(sequences_of(trainer.rollouts[0]))
    tokenizer = cases.tiny_tokenizer()
    rendered = tokenizer.apply_chat_template(seen[0][0], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt) == rendered
    assert seen[0][1][0]["role"] == "assistant"


def test_async_rewards_are_awaited(tmp_path):
    async def slow(prompts, completions, completion_ids, target, **kwargs):
        await asyncio.sleep(0)
        return ppo_cases.letters(prompts, completions, completion_ids, target)

    plain = run(cases.tiny_llama, tmp_path / "plain", max_steps=5)
    waited = run(cases.tiny_llama, tmp_path / "waited", reward_funcs=slow, max_steps=5)
    assert cases.largest_difference(trained(plain), trained(waited)) == 0.0


def test_several_rewards_are_weighted_and_logged_by_name(tmp_path):
    def length(completion_ids, **kwargs):
        return [float(len(each)) for each in completion_ids]

    def one(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = run(cases.tiny_llama, tmp_path, reward_funcs=[length, one], reward_weights=[0.5, -2.0])
    for reward, of_length, of_one in zip(
        logged(trainer, "reward"), logged(trainer, "rewards/length"), logged(trainer, "rewards/one"), strict=True
    ):
        assert of_one == 1.0
        assert reward == pytest.approx(0.5 * of_length - 2.0)


def test_a_reward_that_fails_is_named(tmp_path):
    def broken(prompts, completions, **kwargs):
        raise KeyError("gold")

    with pytest.raises(RewardError, match="broken"):
        run(cases.tiny_llama, tmp_path, reward_funcs=broken)


# --- consolidation ---------------------------------------------------------------------------------------------------


@slowly_both_models
def test_ewc_in_closed_form_equals_autograd(make, tmp_path):
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "max_grad_norm": 0.5,
        "max_steps": 3,
    }

    def ingredients(model):
        parameters = trainable_parameters(policy_of(model))
        importance = cases.random_like(parameters, 1)
        anchor = {name: each + 0.1 for name, each in snapshot(parameters).items()}
        return parameters, anchor, importance

    class WithPenalty(PPOTrainer):
        def train(self, *args, **kwargs):
            self.parameters, self.anchor, self.importance = ingredients(self.model)
            return super().train(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            penalty = ewc_penalty(self.parameters, self.anchor, self.importance)
            return super().compute_loss(*args, **kwargs) + 0.2 * penalty

    closed = build(make(0), tmp_path / "closed", **options)
    _, anchor, importance = ingredients(closed.model)
    EWCCallback(importance, anchor, strength=0.2).bind(closed)
    closed.train()
    autograd = build(make(0), tmp_path / "autograd", kind=WithPenalty, **options)
    autograd.train()
    plain = run(make, tmp_path / "plain", **options)
    assert cases.largest_difference(trained(closed), trained(autograd)) < 2e-6
    assert cases.largest_difference(trained(closed), trained(plain)) > 1e-3
    assert logged(closed, "ewc/penalty")[0] > 0


# --- saving and evaluating -------------------------------------------------------------------------------------------


def test_the_saved_model_is_the_policy(tmp_path):
    trainer = run(cases.tiny_llama, tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert cases.largest_difference(cases.weights(loaded), cases.weights(trainer.policy)) == 0.0


def test_what_is_kept_brings_critic_and_kl_coefficient_to_another_trainer(tmp_path):
    first = run(cases.tiny_llama, tmp_path / "first", adaptive_kl=True, kl_target=1e-6, kl_horizon=40.0)
    second = build(cases.tiny_llama(0), tmp_path / "second", adaptive_kl=True)
    second.restore_state({name: each.clone() for name, each in first.kept_state().items()})
    assert second.kept_state().keys() == first.kept_state().keys()
    assert all(torch.equal(each, first.kept_state()[name]) for name, each in second.kept_state().items())
    other = build(cases.tiny_llama(0), tmp_path / "third", critic="separate")
    with pytest.raises(ValueError, match="critic does not fit"):
        other.restore_state(first.kept_state())


@pytest.mark.parametrize("by_name", [True, False])
def test_a_saved_policy_brings_its_critic_and_leaves_the_kl_coefficient_to_the_options(by_name, tmp_path):
    first = run(cases.tiny_llama, tmp_path, max_steps=2, kl_coef=0.1)
    first.save_model()
    model = str(tmp_path) if by_name else AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    second = build(model, tmp_path / "second", kl_coef=0.2)
    assert second.model.critic.head.weight.abs().max() > 0
    assert runs.same(cases.weights(second.model.critic), cases.weights(first.model.critic))
    assert second.kept_state()["kl_coef"] == 0.2


@pytest.mark.parametrize(
    ("named", "reason"),
    [(False, "The saved critic does not fit"), (True, "`critic_model_name_or_path` names another")],
)
def test_a_critic_beside_the_policy_that_is_not_read_is_told(named, reason, tmp_path):
    run(cases.tiny_llama, tmp_path, max_steps=1).save_model()
    tiny_scorer().save_pretrained(tmp_path / "scorer")
    options = {"critic_model_name_or_path": str(tmp_path / "scorer")} if named else {}
    with pytest.warns(UserWarning, match=rf"The critic '.*critic\.safetensors' is not read: {reason}"):
        build(str(tmp_path), tmp_path / "second", critic="separate", **options)


def test_a_damaged_critic_beside_the_policy_is_refused(tmp_path):
    run(cases.tiny_llama, tmp_path, max_steps=1).save_model()
    (tmp_path / "critic.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"`critic` '.*critic\.safetensors': its weights cannot be loaded"):
        build(str(tmp_path), tmp_path / "second")


def test_evaluation_is_greedy_repeatable_and_leaves_training_alone(tmp_path):
    rows = ppo_cases.prompts(5)
    plain = run(cases.tiny_llama, tmp_path / "plain", max_steps=5)
    evaluated = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 3}
    watched = run(cases.tiny_llama, tmp_path / "watched", max_steps=5, **evaluated)
    assert cases.largest_difference(trained(plain), trained(watched)) == 0.0
    first, second = watched.evaluate(), watched.evaluate()
    assert first == second
    assert {"eval_reward", "eval_reward_std", "eval_rewards/letters", "eval_completions/mean_length"} <= first.keys()
    assert watched.evaluate({"a": rows, "b": rows.select([0])}).keys() >= {"eval_a_reward", "eval_b_reward"}


def test_evaluation_takes_every_row_once_whatever_the_batches(tmp_path):
    trainer = build(cases.tiny_llama(0), tmp_path, eval_dataset=ppo_cases.prompts(7), per_device_eval_batch_size=3)
    other = build(cases.tiny_llama(0), tmp_path, eval_dataset=ppo_cases.prompts(7), per_device_eval_batch_size=7)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(other.evaluate()["eval_reward"])


def test_evaluation_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        build(cases.tiny_llama(0), tmp_path).evaluate()


def test_callbacks_see_every_step(tmp_path):
    class Events(TrainerCallback):
        def __init__(self):
            self.count = {}

        def _see(self, name):
            self.count[name] = self.count.get(name, 0) + 1

        def on_step_begin(self, *args, **kwargs):
            self._see("step begin")

        def on_pre_optimizer_step(self, *args, **kwargs):
            self._see("before optimizer")

        def on_step_end(self, *args, **kwargs):
            self._see("step end")

        def on_epoch_begin(self, *args, **kwargs):
            self._see("epoch")

    events = Events()
    trainer = build(
        cases.tiny_llama(0), tmp_path, callbacks=[events], rows=ppo_cases.prompts(4), max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    assert events.count == {"step begin": 8, "before optimizer": 8, "step end": 8, "epoch": 2}
    assert trainer.state.epoch == 2.0


def test_a_name_loads_model_and_tokenizer(tmp_path):
    cases.tiny_llama(0).save_pretrained(tmp_path / "model")
    cases.tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = PPOTrainer(
        str(tmp_path / "model"),
        ppo_cases.arguments(tmp_path / "out", max_steps=1),
        ppo_cases.prompts(),
        reward_funcs=ppo_cases.letters,
    )
    trainer.train()
    assert trainer.state.global_step == 1
