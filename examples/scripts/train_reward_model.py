r"""Train a reward model on preference pairs with TRL's `RewardTrainer`, for the `reward_funcs` of PPO.

The model starts from a causal language model or another reward model (`--model`), or from random weights
(`--tokenizer`). Files have rows of `prompt`, `chosen` and `rejected`, as messages or as text. From the repository
root, on the CPU, after `train_tiny_model.py`:

    python examples/scripts/train_reward_model.py --model tiny-model --limit 600 \
        --pairs ../shared/data/preference/ukpconvarg_train.jsonl.gz \
            ../shared/data/preference/instruct_human_train.jsonl.gz \
        --eval_pairs ../shared/data/preference/ukpconvarg_test.jsonl.gz \
            ../shared/data/preference/instruct_human_test.jsonl.gz
    hbat train --config examples/configs/real_ppo_cpu.yaml

On a GPU, from a larger model:

    python examples/scripts/train_reward_model.py --model Qwen/Qwen3-0.6B --output_dir qwen3-reward \
        --learning_rate 1e-5 --batch_size 32 --max_length 1024 --bf16 --pairs pairs.jsonl --eval_pairs held-out.jsonl

It prints the accuracy on held-out pairs by file: how often the chosen side scores higher; guessing gives 50 %.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, set_seed
from trl import RewardConfig, RewardTrainer

CONTEXT = 1024  # max position of a model with random weights


def main() -> None:
    """Train the model, print its accuracy on held-out pairs, and save it with its tokenizer."""
    options = parse_arguments()
    set_seed(options.seed)  # for the new weights: all of them, or those of the head
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    trainer = RewardTrainer(
        model=load_model(options, tokenizer),
        args=configuration(options),
        train_dataset=concatenate_datasets([load_pairs(file, options.limit) for file in options.pairs]),
        eval_dataset={Path(file).name.split(".")[0]: load_pairs(file) for file in options.eval_pairs} or None,
        processing_class=tokenizer,
    )
    trainer.train()
    for name, accuracy in held_out_accuracies(trainer).items():
        print(f"{name}: the chosen side scores higher in {100 * accuracy:.1f} % of the held-out pairs")
    trainer.save_model(options.output_dir)
    print(f"Saved in {Path(options.output_dir).resolve()}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="name or folder of a language model or reward model to start from")
    start.add_argument("--tokenizer", help="name or folder of a tokenizer: start from random weights")
    parser.add_argument("--pairs", nargs="+", required=True, help="preference files to train on (.jsonl[.gz])")
    parser.add_argument("--eval_pairs", nargs="*", default=[], help="preference files to measure the accuracy on")
    parser.add_argument("--limit", type=int, help="random pairs taken per training file (default: all)")
    parser.add_argument("--output_dir", default="tiny-reward-model", help="folder of the model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="with --tokenizer: hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="with --tokenizer: layers (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs per step (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=192, help="longer pairs are dropped (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser.parse_args()


def load_pairs(file: str, limit: int | None = None) -> Dataset:
    """Load preference pairs in a fixed order, at most `limit`."""
    rows = load_dataset("json", data_files=file, split="train").shuffle(seed=0)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def load_model(options: argparse.Namespace, tokenizer: Any) -> Any:
    """Load the model to start from, or build one with random weights, in float32."""
    if options.model:
        return AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype="float32")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 32),
        num_key_value_heads=max(1, options.hidden // 32),
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    return AutoModelForSequenceClassification.from_config(config)


def configuration(options: argparse.Namespace) -> RewardConfig:
    """Build the configuration of the trainer."""
    return RewardConfig(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=options.max_length,
        center_rewards_coefficient=0.01,  # the loss does not determine the mean
        bf16=options.bf16,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def held_out_accuracies(trainer: RewardTrainer) -> dict[str, float]:
    """Measure the accuracy on every evaluation file."""
    found = {}
    for name, rows in (trainer.eval_dataset or {}).items():
        trainer.evaluate(rows)
        found[name] = trainer.state.log_history[-1]["eval_accuracy"]  # TRL below 1.6 puts it into the log only
    return found


if __name__ == "__main__":
    main()
