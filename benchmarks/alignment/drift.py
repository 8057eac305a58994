"""How far the penalty at strength 1 holds a preference stage back, over learning rates, sizes and adapters.

    python benchmarks/alignment/drift.py [--output FOLDER]

Prints, for each setting, the root mean square of what the DPO stage changes, without and with the penalty, and the
share that is held back. One strength should mean much the same everywhere. Minutes on one core.
"""

import argparse
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from model import SECTION, build_tokenizer, load_base, tokenized
from peft import LoraConfig
from run import RESULTS
from spec import REGIMES
from task import demonstrations, pairs
from training import Watch

from hbat import HBATConfig, HBATTrainer

ROWS = 1024
CONFLICT = REGIMES["main"].conflict


@dataclass(frozen=True)
class Setting:
    """Learning rates, base and LoRA rank (0: all weights)."""

    base: str
    sft: float
    dpo: float
    rank: int = 0

    @property
    def name(self) -> str:
        """A line of the table."""
        kind = f"LoRA r{self.rank}" if self.rank else "full"
        return f"{kind}, {self.base}, SFT {self.sft:g}, DPO {self.dpo:g}"


SETTINGS = (
    Setting("small", 1e-3, 1e-3),
    Setting("small", 1e-4, 1e-4),
    Setting("small", 1e-5, 1e-5),
    Setting("small", 1e-5, 1e-6),
    Setting("large", 1e-4, 1e-4),
    Setting("small", 2e-3, 2e-3, rank=8),
    Setting("small", 2e-3, 2e-3, rank=32),
    Setting("small", 2e-3, 2e-4, rank=8),
)


def drift(setting: Setting, strength: float, folder: Path) -> float:
    """Root mean square of the change of a trained element over the DPO stage."""
    tokenizer, watch = build_tokenizer(), Watch()
    common = SECTION | {"lr_scheduler_type": "cosine", "warmup_steps": 5, "seed": 0}
    with tempfile.TemporaryDirectory() as work:
        HBATTrainer(
            load_base(setting.base, 0, folder),
            HBATConfig(
                output_dir=work, objectives=["sft", "dpo"], seed=0, disable_tqdm=True, ewc={"strength": strength},
                sft=common | {"learning_rate": setting.sft}, dpo=common | {"learning_rate": setting.dpo, "beta": 0.1},
            ),
            {"sft": tokenized(demonstrations(0, ROWS, CONFLICT), tokenizer),
             "dpo": Dataset.from_list(pairs(0, ROWS, CONFLICT))},
            processing_class=tokenizer,
            callbacks=[watch],
            peft_config=_lora(setting.rank) if setting.rank else None,
        ).train()  # fmt: skip
    changes = [(watch.end[name] - start).flatten() for name, start in watch.start.items()]
    return math.sqrt(float(torch.cat(changes).square().mean()))


def _lora(rank: int) -> LoraConfig:
    layers = ["c_attn", "c_fc", "c_proj"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM")


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the base models")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print("| setting | without | with | held back |\n|---|---|---|---|")
    for setting in SETTINGS:
        without, held = (drift(setting, strength, folder) for strength in (0.0, 1.0))
        print(f"| {setting.name} | {without:.2e} | {held:.2e} | {100 * (1 - held / without):.0f} % |", flush=True)


if __name__ == "__main__":
    main()
