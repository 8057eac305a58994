r"""Alternate SFT and DPO on a quantized model with one LoRA adapter (QLoRA), on a single GPU.

A model of 7B parameters in 4 bits (NF4) with an 8-bit optimizer, meant for a GPU with 24 GB:

    python examples/scripts/hbat_qlora_single_gpu.py --model Qwen/Qwen2.5-7B --bf16 \
        --sft trl-lib/tldr --dpo trl-lib/tldr-preference --optim paged_adamw_8bit

The same in 8 bits (LLM.int8):

    python examples/scripts/hbat_qlora_single_gpu.py --model Qwen/Qwen2.5-7B --bf16 --bits 8 \
        --sft trl-lib/tldr --dpo trl-lib/tldr-preference

On the CPU, with the model of `train_tiny_model.py`:

    python examples/scripts/hbat_qlora_single_gpu.py --model tiny-model --use_cpu \
        --sft ../shared/data/sft/selfinstruct_human_train.jsonl.gz \
        --dpo ../shared/data/preference/instruct_human_train.jsonl.gz

`--merge FOLDER` merges the adapter into the unquantized weights and saves a model that needs neither PEFT nor
bitsandbytes. For LoRA on unquantized weights and full fine-tuning see `hbat_sft_dpo.py`. The same command again
resumes an interrupted run. Requires the extras `peft` and `quantization`.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hbat import HBATConfig, HBATTrainer


def main() -> None:
    """Train or resume, save the adapter, and merge it if `--merge` is given."""
    options = parse_arguments()
    trainer = HBATTrainer(
        model=options.model,
        args=configuration(options),
        train_dataset={"sft": load_rows(options.sft), "dpo": load_rows(options.dpo)},
        peft_config=adapter(options),
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    print(f"Adapter in {Path(options.output_dir).resolve()}")
    if options.merge:
        # Into the weights before quantization, so that the sum is rounded only once.
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        PeftModel.from_pretrained(base, options.output_dir).merge_and_unload().save_pretrained(options.merge)
        trainer.processing_class.save_pretrained(options.merge)
        print(f"Merged model in {Path(options.merge).resolve()}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--sft", required=True, help="demonstrations: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--dpo", required=True, help="preference pairs: name on the Hub, or file (.jsonl[.gz])")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="bits per weight (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--output_dir", default="hbat-qlora", help="folder of the run (default: %(default)s)")
    parser.add_argument("--merge", help="folder for the merged model")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of SFT and DPO (default: %(default)s)")
    parser.add_argument("--sft_learning_rate", type=float, default=2e-4, help="(default: %(default)s)")
    parser.add_argument("--dpo_learning_rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument(
        "--optim", default="adamw_torch", help="name of a transformers optimizer (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=2, help="rows per micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=16, help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=768, help="tokens per row (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU")
    options = parser.parse_args()
    options.dtype = "bfloat16" if options.bf16 else "float32"
    return options


def configuration(options: argparse.Namespace) -> HBATConfig:
    """Build the configuration of the run."""
    shared = {
        "bf16": options.bf16,
        "use_cpu": options.use_cpu,
        "optim": options.optim,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "max_length": options.max_length,
        "gradient_checkpointing": True,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_steps": 100,
    }
    return HBATConfig(
        output_dir=options.output_dir,
        num_rounds=options.rounds,
        objectives=["sft", "dpo"],
        model_init_kwargs={"quantization_config": quantization(options), "dtype": options.dtype},
        sft=shared | {"learning_rate": options.sft_learning_rate},
        dpo=shared | {"learning_rate": options.dpo_learning_rate, "beta": 0.1},
        ewc={"strength": 0.5},
        on_bad_rows="drop",
    )


def quantization(options: argparse.Namespace) -> BitsAndBytesConfig:
    """Configure the quantization of the frozen weights."""
    if options.bits == 8:  # noqa: PLR2004
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options.dtype,
    )


def adapter(options: argparse.Namespace) -> LoraConfig:
    """Configure the LoRA adapter."""
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def load_rows(name: str) -> Dataset:
    """Load rows from the Hub or a file."""
    source = {"path": "json", "data_files": name} if Path(name).is_file() else {"path": name}
    return load_dataset(**source, split="train")


if __name__ == "__main__":
    main()
