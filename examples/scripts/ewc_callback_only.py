r"""Elastic weight consolidation alone, in plain TRL trainers: learn one task, then a second without losing the first.

`SFTTrainer` learns the rows of `--first`. How far that moved each weight is its importance. A second `SFTTrainer` then
learns the rows of `--second`, held back by `EWCCallback`. Any `transformers.Trainer` takes the callback the same way.

Full fine-tuning on the CPU, with the model of `train_tiny_model.py`:

    python examples/scripts/ewc_callback_only.py --model tiny-model --use_cpu \
        --first ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --second ../shared/data/sft/gsm8k_train.jsonl.gz

A LoRA adapter on a GPU; data sets by their names on the Hub, or files:

    python examples/scripts/ewc_callback_only.py --model Qwen/Qwen2.5-0.5B --lora --bf16 --learning_rate 2e-4 \
        --first trl-lib/tldr --second trl-lib/Capybara

`--f_max 0` trains without the penalty, for comparison.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbat import EWCCallback, displacement, normalize, snapshot, trainable_parameters


def main() -> None:
    """Train both tasks, print the loss of each after each, and save the model."""
    options = parse_arguments()
    rows = {name: load_rows(getattr(options, name), options) for name in ("first", "second")}

    trainer = build_trainer(options.model, rows, "first", options, peft_config=adapter() if options.lora else None)
    before = snapshot(trainable_parameters(trainer.model))
    trainer.train()
    importance = normalize(displacement(trainable_parameters(trainer.model), before))
    report("first", trainer)
    # From disk: accelerate wraps a model's `forward`, and would leave half precision out of a second training.
    trainer.save_model()
    model = load_adapter(options.output_dir) if options.lora else options.output_dir

    held_back = EWCCallback(importance, f_max=options.f_max)
    trainer = build_trainer(model, rows, "second", options, callbacks=[held_back])
    trainer.train()
    report("second", trainer)
    trainer.save_model()


def report(task: str, trainer: SFTTrainer) -> None:
    """Print the losses on held-out rows of both tasks.

    Args:
        task: What was trained last.
        trainer: Its trainer.
    """
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
    """Build a plain TRL trainer.

    Args:
        model: The model or its name.
        rows: Rows by task, each with its splits `train` and `test`.
        task: Which of them to train on.
        options: The options.
        peft_config: Configuration of a new adapter.
        callbacks: Callbacks.

    Returns:
        The trainer.
    """
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
        eval_dataset={name: each["test"] for name, each in rows.items()},
        peft_config=peft_config,
        callbacks=callbacks,
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--first", required=True, help="rows of the task to keep: name on the Hub, or file")
    parser.add_argument("--second", required=True, help="rows of the task to add: name on the Hub, or file")
    parser.add_argument("--held_out", type=int, default=64, help="rows kept for evaluation (default: %(default)s)")
    parser.add_argument("--output_dir", default="ewc-callback", help="folder of the model (default: %(default)s)")
    parser.add_argument("--f_max", type=float, default=10.0, help="strength of EWC, 0 is off (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in a step (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=768, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args()


def load_rows(name: str, options: argparse.Namespace) -> DatasetDict:
    """Load rows from the Hub or from a file, and hold some out.

    Args:
        name: Name or path.
        options: The options.

    Returns:
        The rows, as `train` and `test`.
    """
    source = {"path": "json", "data_files": name} if Path(name).is_file() else {"path": name}
    return load_dataset(**source, split="train").train_test_split(test_size=options.held_out, seed=0)


def adapter() -> Any:
    """Describe the adapter.

    Returns:
        PEFT's configuration.
    """
    from peft import LoraConfig  # noqa: PLC0415 - an optional extra

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def load_adapter(folder: str) -> Any:
    """Load a model with its adapter, to go on training it.

    Args:
        folder: Where it was saved.

    Returns:
        The model.
    """
    from peft import AutoPeftModelForCausalLM  # noqa: PLC0415 - an optional extra

    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype="float32")


if __name__ == "__main__":
    main()
