r"""Alternate SFT and DPO on one model from Python: full fine-tuning or a LoRA adapter.

Full fine-tuning on the CPU, with the model of `train_tiny_model.py`:

    python examples/scripts/hbat_sft_dpo.py --model tiny-model --use_cpu \
        --sft ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --dpo ../shared/data/preference/instruct_human_train.jsonl.gz

Full fine-tuning on a GPU; data sets by their names on the Hub, or files:

    python examples/scripts/hbat_sft_dpo.py --model Qwen/Qwen2.5-0.5B --bf16 --sft trl-lib/tldr \
        --dpo trl-lib/tldr-preference --sft_learning_rate 1e-5 --dpo_learning_rate 1e-6

A LoRA adapter:

    python examples/scripts/hbat_sft_dpo.py --model Qwen/Qwen2.5-0.5B --lora --bf16 --sft trl-lib/tldr \
        --dpo trl-lib/tldr-preference --sft_learning_rate 2e-4 --dpo_learning_rate 2e-5

Several GPUs, each with the whole model (`examples/accelerate_configs/` has other set-ups):

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/scripts/hbat_sft_dpo.py ...

The same command again resumes an interrupted run. For a model that is too large, see `hbat_qlora_single_gpu.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hbat import HBATConfig, HBATTrainer


def main() -> None:
    """Train or resume, save the model, and print the scores of both objectives after every stage."""
    options = parse_arguments()
    train, held_out = {}, {}
    for name in ("sft", "dpo"):
        splits = load_rows(getattr(options, name)).train_test_split(test_size=options.held_out, seed=0)
        train[name], held_out[name] = splits["train"], splits["test"]
    trainer = HBATTrainer(
        model=options.model,
        args=configuration(options),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=adapter() if options.lora else None,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    for stage, losses in trainer.matrix.lines():
        print(f"{stage:16}", *(f"{name} loss {loss:.4f}" for name, loss in zip(train, losses, strict=True)), sep="  ")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--sft", required=True, help="demonstrations: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--dpo", required=True, help="preference pairs: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--held_out", type=int, default=64, help="rows kept for evaluation (default: %(default)s)")
    parser.add_argument("--output_dir", default="hbat-sft-dpo", help="folder of the run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of SFT and DPO (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.5, help="strength of EWC, 0 is off (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--sft_learning_rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--dpo_learning_rate", type=float, default=5e-5, help="(default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="beta of DPO (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=768, help="tokens per row (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU")
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> HBATConfig:
    """Build the configuration of the run."""
    shared = {
        "bf16": options.bf16,
        "use_cpu": options.use_cpu,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "max_length": options.max_length,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_steps": 100,
    }
    return HBATConfig(
        output_dir=options.output_dir,
        num_rounds=options.rounds,
        objectives=["sft", "dpo"],
        sft=shared | {"learning_rate": options.sft_learning_rate},
        dpo=shared | {"learning_rate": options.dpo_learning_rate, "beta": options.beta},
        ewc={"strength": options.strength},
        on_bad_rows="drop",  # such as pairs with contradicting labels; the log counts them
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
