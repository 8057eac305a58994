"""Peak memory of a DPO stage under EWC over that of a plain TRL trainer with its reference model.

In copies of the weights. Each variant runs in its own process on the CPU, so what a GPU run keeps in CPU memory (the
accumulated importance of each objective, optimizer moments of the objective that does not train) counts as well.

    python benchmarks/memory.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from workload import byte_tokenizer, llama, rows, save, status

from hbat import HBATConfig, HBATTrainer
from hbat.model.copies import unpatched_copy

VARIANTS = {
    "plain TRL": None,
    "hbat, no EWC": {"ewc": None, "optimizer_state": "reset"},
    "hbat, EWC per tensor": {"ewc": {"granularity": "tensor"}, "optimizer_state": "reset"},
    "hbat, EWC per element": {"ewc": {}, "optimizer_state": "reset"},
    "hbat, default": {},
}
COMMON = {
    "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "max_length": 64, "max_steps": 2,
    "per_device_train_batch_size": 1, "save_strategy": "no", "use_cpu": True,
}  # fmt: skip


class Peak(TrainerCallback):
    """Peak memory of the last training."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Reset the peak."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def on_train_end(self, *_: object, **__: object) -> None:
        """Read the peak."""
        self.bytes = status("VmHWM")


def measure(variant: str) -> tuple[int, int]:
    """Peak bytes of the last DPO stage of a variant, over those before the model, and the size of the weights."""
    torch.set_num_threads(1)
    tokenizer, options, peak = byte_tokenizer(), VARIANTS[variant], Peak()
    data = {"sft": rows(8, 20, preference=False, seed=1), "dpo": rows(8, 20, preference=True, seed=2)}
    before = status("VmRSS")
    model = llama(512, 12, vocabulary=16000)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if options is None:
            args = DPOConfig(output_dir=folder, report_to="none", disable_tqdm=True, **COMMON)
            DPOTrainer(
                model, ref_model=unpatched_copy(model), args=args, train_dataset=data["dpo"],
                processing_class=tokenizer, callbacks=[peak],
            ).train()  # fmt: skip
        else:
            config = HBATConfig(output_dir=folder, num_rounds=2, sft=COMMON, dpo=COMMON, disable_tqdm=True, **options)
            HBATTrainer(model, config, data, processing_class=tokenizer, callbacks=[peak]).train()
    return peak.bytes - before, size


def main() -> None:
    """Measure all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.variant:
        print(json.dumps(measure(given.variant)))
        return
    result = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, size = json.loads(printed.splitlines()[-1])
        result[variant] = peak
        over = (peak - result["plain TRL"]) / size
        print(f"{variant:24}{peak / 2**20:8.0f} MiB{over:+8.2f} copies of the weights ({size / 2**20:.0f} MiB)")
    save("memory", {"peaks": result})


if __name__ == "__main__":
    main()
