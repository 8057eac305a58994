r"""Alternate SFT and PPO on one model from Python. The reward is a function or a reward model.

Full fine-tuning on the CPU, with the model of `train_tiny_model.py` and the reward function below:

    python examples/scripts/hbat_ppo.py --model tiny-model --use_cpu \
        --sft ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --prompts ../shared/data/preference/instruct_human_train.jsonl.gz

The same with the reward model of `configs/reward_cpu.yaml`:

    python examples/scripts/hbat_ppo.py --model tiny-model --use_cpu --reward_model tiny-reward-model \
        --sft ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --prompts ../shared/data/preference/instruct_human_train.jsonl.gz

A LoRA adapter on a GPU; data sets by their names on the Hub, or files:

    python examples/scripts/hbat_ppo.py --model Qwen/Qwen3-0.6B --lora --bf16 \
        --sft trl-lib/tldr --prompts trl-lib/tldr --reward_model qwen3-reward \
        --sft_learning_rate 2e-4 --ppo_learning_rate 1e-5 --completion_length 64

Several GPUs (DDP): `accelerate launch examples/scripts/hbat_ppo.py ...`. The same command again resumes an interrupted
run.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hbat import HBATConfig, HBATTrainer

WORDS = 40  # length that the reward function prefers


def main() -> None:
    """Train or resume, and save the model."""
    options = parse_arguments()
    trainer = HBATTrainer(
        model=options.model,
        args=configuration(options),
        train_dataset={
            "sft": load_rows(options.sft),
            "ppo": load_rows(options.prompts),
        },
        reward_funcs=options.reward_model or varied,
        peft_config=adapter() if options.lora else None,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    rewards = [entry["ppo/reward"] for entry in trainer.state.log_history if "ppo/reward" in entry]
    print(f"Reward of sampled completions: {rewards[0]:.3f} in the first log entry, {rewards[-1]:.3f} in the last.")


def varied(completions: list[Any], **_: Any) -> list[float]:
    """Reward varied words and a length of 40 words, at most 1. Replace it by your own function."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]  # text or messages
    lists = [text.lower().split() for text in texts]
    return [len(set(words)) / max(1, len(words)) - abs(len(words) - WORDS) / WORDS for words in lists]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--sft", required=True, help="demonstrations: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--prompts", required=True, help="rows with `prompt`: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--reward_model", help="name or folder (default: the function `varied`)")
    parser.add_argument("--output_dir", default="hbat-ppo", help="folder of the run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of SFT and PPO (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--sft_learning_rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--ppo_learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--kl_coef", type=float, default=0.02, help="KL coefficient (default: %(default)s)")
    parser.add_argument("--rollout", type=int, default=64, help="prompts per rollout (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument(
        "--completion_length", type=int, default=48, help="max tokens per completion (default: %(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU")
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> HBATConfig:
    """Build the configuration of the run."""
    shared = {
        "bf16": options.bf16,
        "use_cpu": options.use_cpu,
        "per_device_train_batch_size": options.batch_size,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine",
        "logging_steps": 8,
        "save_steps": 100,
    }
    return HBATConfig(
        output_dir=options.output_dir,
        num_rounds=options.rounds,
        objectives=["sft", "ppo"],
        sft=shared | {"learning_rate": options.sft_learning_rate, "max_length": 512},
        ppo=shared
        | {
            "learning_rate": options.ppo_learning_rate,
            "rollout_batch_size": options.rollout,
            "num_ppo_epochs": 2,
            "max_completion_length": options.completion_length,
            "kl_coef": options.kl_coef,
        },
        ewc={"strength": 0.5},
        on_bad_rows="drop",
    )


def load_rows(name: str) -> Dataset:
    """Load rows from the Hub or a file."""
    source = {"path": "json", "data_files": name} if Path(name).is_file() else {"path": name}
    return load_dataset(**source, split="train")


def adapter() -> Any:
    """Configure a LoRA adapter."""
    from peft import LoraConfig  # noqa: PLC0415 - an optional extra

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    main()
