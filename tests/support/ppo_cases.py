"""PPO on tiny models: prompts, a reward of the text alone, and trainers."""

import cases
from datasets import Dataset, disable_progress_bars

from hbat.ppo.config import PPOConfig
from hbat.ppo.trainer import PPOTrainer

disable_progress_bars()

#: Arguments beside those of `cases.CHEAP_ARGS`: two passes of two optimizer steps over rollouts of four prompts.
SIZES = {
    "per_device_train_batch_size": 2,
    "rollout_batch_size": 4,
    "num_ppo_epochs": 2,
    "max_completion_length": 6,
    "max_steps": 8,
    "learning_rate": 0.05,
}


def prompts(count=16, *, conversational=False):
    """Prompts of uneven length, with a column for the reward functions."""
    texts = [f"{number} plus {number * number}?" for number in range(count)]
    given = [[{"role": "user", "content": each}] for each in texts] if conversational else texts
    return Dataset.from_dict({"prompt": given, "target": list(range(count))})


def letters(prompts, completions, completion_ids, target, **kwargs):
    """Reward of the text alone, different for nearly every completion."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [
        (sum(map(ord, text)) % 13) / 13 - 0.1 * len(ids) + 0.01 * number
        for text, ids, number in zip(texts, completion_ids, target, strict=True)
    ]


def arguments(folder, **options):
    return PPOConfig(output_dir=str(folder), **(cases.CHEAP_ARGS | SIZES | options))


def build(model, folder, *, rows=None, reward_funcs=letters, kind=PPOTrainer, **options):
    own = {
        key: options.pop(key) for key in ("callbacks", "eval_dataset", "ref_model", "peft_config") if key in options
    }
    return kind(
        model,
        arguments(folder, **options),
        prompts() if rows is None else rows,
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=reward_funcs,
        **own,
    )


def spaced_prompts(*, conversational):
    """Prompts for `cases.spaced_tokenizer`."""
    texts = [f"w{number} w{number + 1}" for number in range(4)]
    return Dataset.from_dict({
        "prompt": [[{"role": "user", "content": text}] if conversational else text for text in texts]
    })


class Spaces:
    """A reward that collects the texts that it sees, and tells whether each begins with a space."""

    def __init__(self):
        self.texts, self.right = [], True

    def __call__(self, completions, completion_ids, **columns):
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        self.texts += texts
        tokenizer = cases.spaced_tokenizer()
        words = [tokenizer.decode(ids, skip_special_tokens=True).split() for ids in completion_ids]
        self.right &= texts == ["".join(f" {word}" for word in each) for each in words]
        return [float(len(text)) for text in texts]


def logged(trainer, key):
    return [each[key] for each in trainer.state.log_history if key in each]


def trained(trainer):
    """Copies of everything that PPO trains, the critic too."""
    return cases.weights(trainer.model)
