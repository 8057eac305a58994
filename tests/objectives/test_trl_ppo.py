"""PPO with TRL's own trainer, as stages of a run. Most of it needs a TRL that still has one."""

import cases
import pytest
import runs
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, TrainerCallback

from hbat.config.hbat import HBATConfig
from hbat.objectives.trl_ppo.models import AnnouncedBatches, RewardsAsModel, collate
from hbat.objectives.trl_ppo.objective import is_available, trl_ppo
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.prompts import tokenize_prompts
from hbat.trainer import HBATTrainer

with_trl = pytest.mark.skipif(not is_available(), reason="TRL has no PPOTrainer since 1.13")
pytestmark = [
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
    # TRL hands its own generation configuration over in two ways.
    pytest.mark.filterwarnings("ignore:Passing `generation_config` together with generation-related arguments"),
]

BUILDERS = {"full": cases.tiny_llama, "lora": cases.lora_llama}
LENGTH = 6
PPO = {
    "optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 2, "per_device_train_batch_size": 4,
    "num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": LENGTH, "stop_token": "eos",
}  # fmt: skip


def prompts(count=8, seed=3, *, conversational=False):
    """Prompts, each with the answer in a column that only the reward functions read."""
    rows = cases.sft_rows(count, seed, conversational=conversational).rename_column("completion", "answer")
    return rows.map(lambda row: {"answer": str(row["prompt"]) + "!"})


def vowels(completions, **_):
    return [float(sum(text.count(letter) for letter in "aeiou")) for text in completions]


def build(
    model, folder, *, sections=None, data=None, evaluation=None, callbacks=None, rewards=vowels, tokenizers=None,
    **options,
):  # fmt: skip
    config = HBATConfig(
        output_dir=str(folder),
        objectives=["sft", "ppo"],
        ppo_backend="trl",
        sft=runs.section(),
        ppo=runs.section(**PPO | (sections or {})),
        disable_tqdm=True,
        **{"num_rounds": 2, "ewc": None, "optimizer_state": "reset", "seed": runs.SEED} | options,
    )
    return HBATTrainer(
        model,
        config,
        {"sft": cases.sft_rows(8, 3), "ppo": data or prompts()},
        eval_dataset=evaluation,
        processing_class=cases.tiny_tokenizer(),
        callbacks=callbacks,
        reward_funcs=rewards,
        reward_processing_classes=tokenizers,
    )


def train(model, folder, *, resume=None, **options):
    run = build(model, folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def of_stages(run, key):
    """Values of one entry of the log by stage."""
    found = {}
    for entry in run.state.log_history:
        if key in entry and "hbat/stage" in entry:
            found.setdefault(entry["hbat/stage"], []).append(entry[key])
    return found


# --- without TRL's trainer -------------------------------------------------------------------------------------------


@pytest.mark.skipif(is_available(), reason="TRL has a PPOTrainer")
def test_a_trl_without_ppo_is_named_at_construction(tmp_path):
    with pytest.raises(ImportError, match=r"removed in TRL 1\.13.*ppo_backend: hbat.*trl<1\.13"):
        build(cases.tiny_llama(), tmp_path)


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
def test_rewards_get_prompts_completions_and_columns_of_the_same_rows(conversational):
    tokenizer, seen = cases.tiny_tokenizer(), []

    def reward(prompts, completions, completion_ids, answer, **_):
        seen.extend(zip(prompts, completions, completion_ids, answer, strict=True))
        return [float(len(each)) for each in completion_ids]

    rows = tokenize_prompts(prompts(4, conversational=conversational), tokenizer)
    model = RewardsAsModel(Rewards(reward), tokenizer, lambda: None)
    batch = collate(list(rows), tokenizer.pad_token_id)
    texts = ["one", "two of them", "", "last"]
    tokens = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, tokens))
    completions = torch.tensor([each + [tokenizer.pad_token_id] * (longest - len(each)) for each in tokens])
    whole = torch.cat([batch["input_ids"], completions], 1)
    mask = whole != tokenizer.pad_token_id
    model.begin(batch)
    scores = []
    for part in (slice(0, 3), slice(3, 4)):  # TRL scores a rollout in parts, with padding replaced by token 0
        hidden = model.backbone(whole[part].masked_fill(~mask[part], 0), attention_mask=mask[part]).hidden_states[-1]
        scores.append(model.score(hidden))
    assert torch.cat(scores)[:, -1, 0].tolist() == [float(len(each)) for each in tokens]
    for row, text, ids, found in zip(rows, texts, tokens, seen, strict=True):
        written = [{"role": "assistant", "content": text}] if conversational else text
        assert found == (row["prompt"], written, ids, row["answer"])


def test_batches_are_shown_when_they_are_used_and_not_when_they_are_loaded():
    shown = []
    batches = iter(AnnouncedBatches([{"n": 0}, {"n": 1}], shown.append))
    assert next(batches) == {"n": 0}
    assert shown == [{"n": 0}]


# --- with it ---------------------------------------------------------------------------------------------------------


class Critic(TrainerCallback):
    """Keeps the value model's weights at the start and the end of every PPO stage."""

    def __init__(self):
        self.starts, self.ends = [], []

    def _keep(self, model, kept):
        if hasattr(model, "value_model"):
            kept.append({name: each.clone() for name, each in model.value_model.trained().items()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._keep(model, self.starts)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._keep(model, self.ends)


@with_trl
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_ppo_stage_trains_from_its_own_reference_and_its_critic_goes_on(kind, tmp_path):
    critic, model = Critic(), BUILDERS[kind]()
    before = cases.weights(model)
    run = train(model, tmp_path, callbacks=[critic], ewc={"strength": 10.0})
    kl = of_stages(run, "ppo/objective/kl")
    assert kl.keys() == {1, 3}
    for each in kl.values():
        assert len(each) == PPO["max_steps"]
        assert abs(each[0]) < 1e-4
        assert abs(each[1]) > 1e-3
    assert cases.largest_difference(before, cases.weights(model)) > 1e-3
    first, second = critic.starts
    assert cases.largest_difference(first, critic.ends[0]) > 1e-3
    assert runs.same(second, critic.ends[0])
    assert runs.same(runs.state_tensors(tmp_path, "kept-ppo"), critic.ends[1])
    assert not getattr(model, "peft_config", {}).keys() - {"default"}


@with_trl
@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_the_penalty_holds_a_ppo_stage_back(method, tmp_path):
    free = train(cases.tiny_llama(), tmp_path / "free", num_rounds=1, ewc={"strength": 1e-8, "method": method})
    held = train(cases.tiny_llama(), tmp_path / "held", num_rounds=1, ewc={"strength": 1e5, "method": method})
    drift, held_drift = (of_stages(each, "ppo/ewc/drift")[1][-1] for each in (free, held))
    assert of_stages(held, "ppo/ewc/penalty")[1][-1] > 0
    assert 0 < held_drift < 0.5 * drift


@with_trl
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("step", [0, 1], ids=["between stages", "inside a stage"])
def test_a_run_that_was_cut_off_ends_in_the_same_weights(kind, step, tmp_path):
    class CutOffError(RuntimeError):
        pass

    class CutOff(TrainerCallback):
        stage = -1

        def on_train_begin(self, args, state, control, **kwargs):
            self.stage += 1
            self._cut(0)

        def on_step_end(self, args, state, control, **kwargs):
            self._cut(state.global_step)

        def _cut(self, at):
            if (self.stage, at) == (3, step):
                raise CutOffError

    options = {"ewc": {"strength": 1.0}, "optimizer_state": "carry"}
    whole = train(BUILDERS[kind](), tmp_path / "whole", **options)
    with pytest.raises(CutOffError):
        train(BUILDERS[kind](), tmp_path / "cut", callbacks=[CutOff()], **options)
    resumed = train(BUILDERS[kind](), tmp_path / "cut", resume=True, **options)
    assert runs.same(cases.weights(whole.model), cases.weights(resumed.model))


@with_trl
@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
def test_reward_functions_see_the_rows_that_were_sampled_for(conversational, tmp_path):
    seen = []

    def reward(prompts, completions, answer, **_):
        seen.extend(zip(map(str, prompts), answer, strict=True))
        assert all(isinstance(each, list if conversational else str) for each in completions)
        return [1.0 for _ in completions]

    sections = {"max_steps": 3, "local_rollout_forward_batch_size": 3}
    data = prompts(9, conversational=conversational)
    run = train(cases.tiny_llama(), tmp_path, data=data, rewards=reward, sections=sections, num_rounds=1)
    assert len(seen) == 3 * PPO["per_device_train_batch_size"]
    assert all(answer == prompt + "!" for prompt, answer in seen)
    assert of_stages(run, "ppo/objective/scores") == {1: [1.0, 1.0, 1.0]}


@with_trl
def test_a_reward_model_scores_what_the_policy_writes(tmp_path):
    config = LlamaConfig(
        vocab_size=cases.VOCABULARY_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    reward = AutoModelForSequenceClassification.from_config(config)
    run = train(cases.tiny_llama(), tmp_path, rewards=reward, tokenizers=cases.tiny_tokenizer(), num_rounds=1)
    assert len(set(of_stages(run, "ppo/objective/scores")[1])) == PPO["max_steps"]


@with_trl
def test_evaluation_is_the_mean_reward_of_greedy_completions(tmp_path):
    model, tokenizer, rows = cases.tiny_llama(), cases.tiny_tokenizer(), prompts(3, seed=9)
    run = build(model, tmp_path, evaluation={"ppo": rows}, num_rounds=1)
    expected = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        completion = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        expected += vowels([completion])
    assert run.evaluate()["ppo"]["reward"] == pytest.approx(sum(expected) / len(expected))
    assert run.matrix.better_of("ppo") == "higher"


@with_trl
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        train(cases.tiny_llama(), tmp_path, sections={"optim": "sgd", "learning_rate": 1e30}, num_rounds=1)


@with_trl
def test_a_schedule_over_rounds_reaches_the_optimizer(tmp_path):
    run = train(cases.tiny_llama(), tmp_path, lr_schedule={"ppo": "decay", "sft": "stage"})
    rates = of_stages(run, "ppo/lr")
    assert rates[1][0] == pytest.approx(PPO["learning_rate"])
    assert rates[3][0] == pytest.approx(PPO["learning_rate"] / 2)


@with_trl
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"bf16": True}, "trains in the weights' precision"),
        ({"gradient_accumulation_steps": 2}, "another number of optimizer steps"),
        ({"save_strategy": "steps"}, "nor resumes from a checkpoint"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "neither evaluates inside a stage"),
        ({"total_episodes": 8}, "Both `max_steps` and `total_episodes`"),
        ({"response_length": 127}, "leaves room for 1"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_options_that_would_do_nothing_are_refused(sections, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(cases.tiny_llama(), tmp_path, sections=sections, evaluation={"ppo": prompts(1)})


@with_trl
def test_padding_with_the_end_token_is_refused(tmp_path):
    run = build(cases.tiny_llama(), tmp_path)
    tokenizer = cases.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="`pad_token` of its own"):
        HBATTrainer(run.model, run.args, run.train_dataset, processing_class=tokenizer, reward_funcs=vowels)


@with_trl
def test_a_section_needs_no_options_to_switch_off_what_trl_ignores(tmp_path):
    args = trl_ppo(config={"response_length": 3}).base_args(str(tmp_path))
    assert not args.bf16
    assert args.save_strategy == "no"


@with_trl
def test_a_stage_takes_no_checkpoint(tmp_path):
    objective = trl_ppo(config=runs.section(**PPO))
    trainer = objective.trainer_class(
        cases.tiny_llama(),
        objective.base_args(str(tmp_path)),
        prompts(),
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=vowels,
    )
    with pytest.raises(ValueError, match="cannot resume from a checkpoint"):
        trainer.train(resume_from_checkpoint="checkpoint-2")
