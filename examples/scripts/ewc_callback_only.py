r"""Elastic weight consolidation alone, in plain TRL trainers: learn one task, then a second without losing the first.

An `SFTTrainer` learns the rows of `--first`, while the callback of `EWCCallback.measure` measures the importance of
each weight. A second `SFTTrainer` learns the rows of `--second` under the penalty of `EWCCallback`. Any
`transformers.Trainer` takes both callbacks.

Full fine-tuning on the CPU, with the model of `train_tiny_model.py`:

    python examples/scripts/ewc_callback_only.py --model tiny-model --use_cpu \
        --first ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --second ../shared/data/sft/gsm8k_train.jsonl.gz

A LoRA adapter on a GPU; data sets by their names on the Hub, or files:

    python examples/scripts/ewc_callback_only.py --model Qwen/Qwen2.5-0.5B --lora --bf16 --learning_rate 2e-4 \
        --first trl-lib/tldr --second trl-lib/Capybara

`--strength 0` trains without the penalty, for comparison.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbat import EWCCallback


def main() -> None:
    """Train on both tasks in turn, print both losses after each, and save the model."""
    options = parse_arguments()
    rows = {name: load_rows(getattr(options, name), options) for name in ("first", "second")}

    trainer = build_trainer(options.model, rows, "first", options, peft_config=adapter() if options.lora else None)
    measured = EWCCallback.measure()
    trainer.add_callback(measured)
    trainer.train()
    report("first", trainer)
    # Reloaded: accelerate wraps a model's `forward` once, and a second trainer would run without mixed precision.
    trainer.save_model()
    model = load_adapter(options.output_dir) if options.lora else options.output_dir

    penalty = EWCCallback(measured.importance, strength=options.strength)
    trainer = build_trainer(model, rows, "second", options, callbacks=[penalty])
    trainer.train()
    report("second", trainer)
    trainer.save_model()


def report(task: str, trainer: SFTTrainer) -> None:
    """Print the losses on the held-out rows of both tasks."""
    scores = trainer.evaluate()
    losses = (f"loss of the {name} {scores[f'eval_{name}_loss']:.4f}" for name in ("first", "second"))
    print(f"After the {task} task:", ", ".join(losses))


def build_trainer(
    model: Any,
    rows: dict[str, DatasetDict],
    task: str,
    options: argparse.Namespace,
    *,
    peft_config: Any = None,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """Build a plain TRL trainer."""
    args = SFTConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        max_length=options.max_length,
        num_train_epochs=options.epochs,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        bf16=options.bf16,
        use_cpu=options.use_cpu,
        report_to="none",
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=rows[task]["train"],
        eval_dataset={name: splits["test"] for name, splits in rows.items()},
        peft_config=peft_config,
        callbacks=callbacks,
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--first", required=True, help="data of the task to keep: name on the Hub, or file")
    parser.add_argument("--second", required=True, help="data of the task to add: name on the Hub, or file")
    parser.add_argument("--held_out", type=int, default=64, help="rows kept for evaluation (default: %(default)s)")
    parser.add_argument("--output_dir", default="ewc-callback", help="folder of the model (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.5, help="strength of EWC, 0 is off (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=768, help="tokens per row (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU")
    return parser.parse_args()


def load_rows(name: str, options: argparse.Namespace) -> DatasetDict:
    """Load rows from the Hub or a file, and split off a test set."""
    source = {"path": "json", "data_files": name} if Path(name).is_file() else {"path": name}
    return load_dataset(**source, split="train").train_test_split(test_size=options.held_out, seed=0)


def adapter() -> Any:
    """Configure a LoRA adapter."""
    from peft import LoraConfig  # noqa: PLC0415 - an optional extra

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def load_adapter(folder: str) -> Any:
    """Load a model with its adapter, for further training."""
    from peft import AutoPeftModelForCausalLM  # noqa: PLC0415 - an optional extra

    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype="float32")


if __name__ == "__main__":
    main()
