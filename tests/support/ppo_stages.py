"""Runs of SFT and PPO with a penalty."""

import functools

import cases
import ppo_cases
import runs

from hbat.config.hbat import HBATConfig
from hbat.trainer import HBATTrainer

MODELS = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}
#: Four optimizer steps per rollout, two rollouts per stage.
SECTION = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine"}
SAVES = {"save_strategy": "steps", "save_steps": 3}


def build(model, folder, *, ppo=None, sft=None, callbacks=None, evaluation=None, rows=16, data=None, **options):
    config = {"num_rounds": 2, "ewc": {"strength": 1.0}, "disable_tqdm": True, "seed": runs.SEED} | options
    sizes = {key: value for key, value in ppo_cases.SIZES.items() if key != "max_steps"}
    return HBATTrainer(
        model,
        HBATConfig(
            output_dir=str(folder),
            objectives=["sft", "ppo"],
            sft=runs.section(**SECTION | (sft or {})),
            ppo=runs.section(**SECTION | sizes | {"max_steps": -1, "num_train_epochs": 1} | (ppo or {})),
            **config,
        ),
        train_dataset=data or {"sft": cases.sft_rows(8), "ppo": ppo_cases.prompts(rows)},
        eval_dataset=evaluation,
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=ppo_cases.letters,
        callbacks=callbacks,
    )


def train(case, folder, *, resume=None, **options):
    run = build(MODELS[case](0), folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run
