"""The same PPO as TRL's, where both define the same thing. Runs where TRL still has its trainer (`trl < 1.13`).

Both trainers make one rollout and train on it in several passes, with the same prompts, policy, reference, critic and
reward. Completions never end, and ours are those that TRL's has sampled. Then the two agree in advantages, losses, and
all weights after the last step. What is different, and kept out of these runs:

* Reward: TRL adds the score at the position *after* the last token where there is one, whose value and KL term then
  belong to padding; ours falls on the last token, the end token included. Here completions fill all positions.
* Mini-batch mean: TRL averages the means of micro-batches and processes; ours is the mean over all tokens of the
  optimizer step, however it is cut. Here all completions are equally long.
* Accumulation: in the last rollout of each epoch TRL takes an optimizer step after every micro-batch, because
  accelerate stops accumulating at the end of a data loader. Here the rollout is not the last.
* Whitening: TRL whitens within a process, ours over all processes. Here there is one.
* Old log-probabilities: TRL takes them from the scores of generation (in its precision, with its logits processors),
  ours from a forward pass like those that train.
* Critic: TRL's is a model of its own, ours a value head on the policy's trunk unless `critic="separate"`, as here.
* Reference: with an adapter TRL's is the model without it, ours the adapter as it was when the trainer was built. Here
  the adapter starts at zero.
* Clipping of gradients: TRL ignores `max_grad_norm`; ours clips, as transformers does. Here it is off.
* Entropy: TRL's `objective/entropy` is minus the log-probability of a completion; `policy/entropy_avg` is the exact
  entropy during the updates, over padding as well. Ours is the exact one of the rollout's tokens.
* Approximate KL: TRL's is half the mean squared log-ratio, padding included; ours is k3 over tokens of completions.
* Learning rate, logs, evaluation, checkpoints: TRL's count rollouts, ours optimizer steps.
* Options that TRL's does not have: entropy bonus, adaptive KL coefficient, target KL, other ways of sampling, reward
  functions, conversations, resuming.
"""

import functools

import cases
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

trl_ppo = pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer", exc_type=ImportError)

from hbat.ppo.config import PPOConfig  # noqa: E402
from hbat.ppo.maths import masked_mean, whiten  # noqa: E402
from hbat.ppo.trainer import PPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's trainer is deprecated, and written for other versions

LENGTH = 6
PROMPTS = [f"{'word ' * (row % 3)}{row}?" for row in range(16)]  # of which the rollout takes eight
PASSES = 3
RATE = 0.3
SHARED = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1, "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_ppo_epochs": PASSES, "seed": 0,
}  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


class EndlessLlama(LlamaForCausalLM):
    """Samples neither padding nor end token, and can be told what to answer to a prompt."""

    answers = None

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        against = torch.zeros(output.logits.shape[-1])
        against[:2] = -40.0
        output.logits = output.logits + against
        return output

    def generate(self, input_ids, attention_mask=None, **kwargs):
        if self.answers is None:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.tensor([self.answers[each] for each in prompts])], dim=1)


def endless(seed=0):
    torch.manual_seed(seed)
    model = EndlessLlama(cases.tiny_llama().config)
    model.generation_config.eos_token_id = None
    return model


def endless_with_adapter():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(endless(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@functools.cache
def _scorer(seed):
    labels = {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}}
    config = LlamaConfig(**cases.tiny_llama().config.to_dict() | labels | {"initializer_range": 0.2})
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def scorer(seed):
    """A sequence classifier: the reward model (1) or what the critic starts from (2)."""
    model = AutoModelForSequenceClassification.from_config(_scorer(seed).config)
    model.load_state_dict(_scorer(seed).state_dict())
    return model.eval()


def rewarded(prompts, completions, completion_ids, **columns):
    """The reward model on each sequence alone."""
    model, tokenizer = scorer(1), cases.tiny_tokenizer()
    pairs = zip(prompts, completion_ids, strict=True)
    with torch.no_grad():
        hidden = [model.model(torch.tensor([tokenizer(each)["input_ids"] + ids])) for each, ids in pairs]
        return [float(model.score(each.last_hidden_state[0, -1])) for each in hidden]


# --- one rollout with either -----------------------------------------------------------------------------------------


def options_of(kwargs):
    micro = kwargs.get("gradient_accumulation_steps", 1)
    return SHARED | {"per_device_train_batch_size": 8 // micro} | kwargs


def run_trl(folder, monkeypatch, build, **options):
    """Train, and note what TRL's own functions were given and gave."""
    from trl.experimental.ppo import ppo_trainer

    noted = {"generated": [], "whitened": []}
    generation, whitening = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def batch_generation(model, queries, *args):
        responses, scores = generation(model, queries, *args)
        noted["generated"].append((queries, responses[:, queries.shape[1] :]))
        return responses, scores

    def masked_whiten(values, mask, shift_mean=True):
        result = whitening(values, mask, shift_mean)
        noted["whitened"].append((values, result))
        return result

    monkeypatch.setattr(ppo_trainer, "batch_generation", batch_generation)
    monkeypatch.setattr(ppo_trainer, "masked_whiten", masked_whiten)
    tokenizer = cases.tiny_tokenizer()
    tokenizer.padding_side = "left"
    policy = build()
    trainer = trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(
            output_dir=str(folder), response_length=LENGTH, temperature=1.0, num_mini_batches=1, total_episodes=8,
            num_sample_generations=0, **options_of(options),
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None if hasattr(policy, "peft_config") else endless(seed=5),
        reward_model=scorer(1),
        value_model=scorer(2),
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(each)["input_ids"]} for each in PROMPTS]),
    )  # fmt: skip
    trainer.train()
    (log,) = [each for each in trainer.state.log_history if "objective/kl" in each]
    return policy, trainer.value_model, log, noted


def answers_in(noted):
    """Completions by prompt."""
    ((queries, responses),) = noted["generated"]
    assert 0 not in responses
    rows = zip(queries.tolist(), responses.tolist(), strict=True)
    return {tuple(token for token in query if token != 0): response for query, response in rows}


def run_ours(folder, build, answers, **options):
    policy = build()
    causal = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    causal.answers = answers
    scorer(2).save_pretrained(folder / "critic")
    tokenizer = cases.tiny_tokenizer()
    prompts = [each for each in PROMPTS if tuple(tokenizer(each)["input_ids"]) in answers]
    assert len(prompts) == 8
    trainer = PPOTrainer(
        model=policy,
        args=PPOConfig(
            output_dir=str(folder), max_completion_length=LENGTH, max_steps=PASSES, max_grad_norm=0.0,
            critic="separate", critic_model_name_or_path=str(folder / "critic"), **options_of(options),
        ),
        train_dataset=Dataset.from_list([{"prompt": each} for each in prompts]),
        processing_class=tokenizer,
        reward_funcs=rewarded,
        ref_model=None if hasattr(policy, "peft_config") else endless(seed=5),
    )  # fmt: skip
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logs) == PASSES
    return trainer, logs


# --- the comparison --------------------------------------------------------------------------------------------------

RUNS = {
    "plain": {},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.5},
    "whitened rewards": {"whiten_rewards": True},
    "discount": {"gamma": 0.9, "lam": 0.5, "kl_coef": 0.2},
    "clipped": {"cliprange": 0.01, "cliprange_value": 0.01, "vf_coef": 1.0},
    "accumulated": {"gradient_accumulation_steps": 4},
}


def mean(logs, name):
    return sum(each[name] for each in logs) / len(logs)


def moved(model, build):
    """How far the weights are from where they started."""
    start = cases.weights(build())
    return {name: each - start[name] for name, each in cases.weights(model).items()}


def assert_same_movement(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    assert largest > 1e-3
    assert cases.largest_difference(found, expected) < 1e-3 * largest


@pytest.mark.parametrize(
    ("build", "options"),
    [*((endless, each) for each in RUNS.values()), (endless_with_adapter, {"kl_coef": 0.2})],
    ids=[*RUNS, "adapter"],
)
def test_a_rollout_and_the_training_on_it_are_trls(tmp_path, monkeypatch, build, options):
    policy, critic, log, noted = run_trl(tmp_path / "trl", monkeypatch, build, **options)
    trainer, logs = run_ours(tmp_path / "ours", build, answers_in(noted), **options)
    rollout = trainer._progress.rollout  # noqa: SLF001 - what the public logs only show means of

    # What each token is worth.
    ((_, responses),) = noted["generated"]
    place = {tuple(each): row for row, each in enumerate(rollout.completion_ids.tolist())}
    rows = [place[tuple(each)] for each in responses.tolist()]
    raw, white = noted["whitened"][-1]
    torch.testing.assert_close(rollout.advantages[rows], white, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((rollout.returns - rollout.values)[rows], raw, rtol=1e-3, atol=1e-4)

    # What is logged.
    assert logs[0]["kl"] == pytest.approx(log["objective/kl"], rel=1e-4, abs=1e-5)
    assert logs[0]["reward"] == pytest.approx(log["objective/scores"], rel=1e-4)
    assert mean(logs, "loss/policy") == pytest.approx(log["loss/policy_avg"], rel=1e-3, abs=1e-6)
    assert mean(logs, "loss/value") == pytest.approx(log["loss/value_avg"], rel=1e-3)
    assert mean(logs, "update/ratio") == pytest.approx(log["val/ratio"], rel=1e-4)

    # What is learnt.
    assert_same_movement(moved(trainer.policy, build), moved(policy, build))
    assert_same_movement(
        moved(trainer.model.critic.trunk, lambda: scorer(2).model), moved(critic.model, lambda: scorer(2).model)
    )
    assert_same_movement(
        moved(trainer.model.critic.head, lambda: scorer(2).score), moved(critic.score, lambda: scorer(2).score)
    )
    if "cliprange" in options:
        assert log["policy/clipfrac_avg"] > 0.05
        assert log["val/clipfrac_avg"] > 0.05


# --- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
def test_means_and_whitening_are_trls(shift_mean):
    from trl.experimental.ppo import ppo_trainer

    values = torch.randn(5, 7)
    mask = torch.rand(5, 7) < 0.6
    torch.testing.assert_close(masked_mean(values, mask), ppo_trainer.masked_mean(values, mask))
    expected = torch.where(mask, ppo_trainer.masked_whiten(values, mask, shift_mean), 0.0)
    torch.testing.assert_close(whiten(values, mask, shift_mean=shift_mean), expected)
