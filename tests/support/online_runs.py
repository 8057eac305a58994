"""Runs with objectives that generate their answers and learn from rewards."""

import cases
import runs

from hbat.config.hbat import HBATConfig
from hbat.trainer import HBATTrainer

#: Fields that make a rollout of TRL's online trainers cheap: two prompts with two completions of few tokens.
ROLLOUT = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "learning_rate": 0.05,
    "beta": 0.1,
}


def section(**options):
    """Fields of a section of GRPO or RLOO."""
    return runs.section(**ROLLOUT | options)


def prompts(count, seed=0):
    """Rows of prompts, with a column for the reward."""
    rows = cases.sft_rows(count, seed)
    return rows.rename_column("completion", "answer")


def variety(completions, **columns):
    """Reward of a completion: how many different letters it has."""
    return [float(len(set(each))) for each in completions]


def build_run(model, folder, name, *, options=None, evaluation=False, callbacks=None, rewards=variety, **config):
    """A run of SFT and one online objective, or of what `objectives` names."""
    config = {"objectives": ["sft", name], "num_rounds": 2, "ewc": None, "disable_tqdm": True, "seed": 5} | config
    config = {"sft": runs.section(), name: section(**(options or {}))} | config
    names = [getattr(each, "name", each) for each in config["objectives"]]
    train = {"sft": cases.sft_rows(8), name: prompts(8)}
    test = {"sft": cases.sft_rows(4, 1), name: prompts(3, 1)}
    return HBATTrainer(
        model=model,
        args=HBATConfig(output_dir=str(folder), **config),
        train_dataset={each: train[each] for each in names},
        eval_dataset={each: test[each] for each in names} if evaluation else None,
        processing_class=cases.tiny_tokenizer(),
        callbacks=callbacks,
        reward_funcs=rewards,
    )


def train(model, folder, name, *, resume=None, **options):
    """Train such a run to its end."""
    run = build_run(model, folder, name, **options)
    run.train(resume_from_checkpoint=resume)
    return run
