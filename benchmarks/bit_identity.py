"""Digests of the weights after two rounds: {sft+dpo, sft+ppo} x {full, LoRA} x {EWC on, off}, on one CPU thread.

Shows that a change of the code or of a library keeps results bit-identical:

    python benchmarks/bit_identity.py > before.txt
    python benchmarks/bit_identity.py --against before.txt      # exits with 1 if a digest differs
"""

import argparse
import hashlib
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import cases

from hbat import HBATConfig, HBATTrainer

MODELS = {"full": cases.tiny_llama, "lora": cases.lora_llama}
SECTION = {key: value for key, value in cases.CHEAP_ARGS.items() if key not in {"report_to", "disable_tqdm"}} | {
    "learning_rate": 0.01,
    "optim": "adamw_torch",
}
PPO = {"rollout_batch_size": 4, "num_ppo_epochs": 2, "max_completion_length": 6}


def reward(completions: list[str], completion_ids: list[list[int]], target: list[int], **_: Any) -> list[float]:
    """Depends on the text, its length and another column."""
    columns = zip(completions, completion_ids, target, strict=True)
    return [(sum(map(ord, text)) % 13) / 13 - 0.1 * len(ids) + 0.01 * number for text, ids, number in columns]


def digest(preference: str, model: str, *, ewc: Any) -> str:
    """Train a run and hash its trainable weights."""
    if preference == "dpo":
        rows = cases.preference_rows(16, 3)
    else:
        prompts = [f"{number} plus {number * number}?" for number in range(16)]
        rows = Dataset.from_dict({"prompt": prompts, "target": list(range(16))})
    with tempfile.TemporaryDirectory() as folder:
        args = HBATConfig(
            output_dir=f"{folder}/run",
            num_rounds=2,
            objectives=["sft", preference],
            seed=5,
            disable_tqdm=True,
            **{"sft": SECTION, preference: SECTION | (PPO if preference == "ppo" else {})},
            ewc=ewc,
        )
        trainer = HBATTrainer(
            MODELS[model](0),
            args,
            train_dataset={"sft": cases.sft_rows(16, 3), preference: rows},
            processing_class=cases.tiny_tokenizer(),
            reward_funcs=reward if preference == "ppo" else None,
        )
        trainer.train()
    found = hashlib.sha256()
    for name, parameter in sorted(cases.trainable(trainer.model).items()):
        found.update(name.encode())
        found.update(parameter.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    """Print a digest per run; return 1 if one is not among those of `--against`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="output of an earlier call to compare with")
    parser.add_argument("--ewc", type=json.loads, default={}, help='options of "ewc" where it is on, as JSON')
    given = parser.parse_args()
    expected = given.against.read_text(encoding="utf-8").splitlines() if given.against else None
    torch.set_num_threads(1)
    disable_progress_bars()
    status = 0
    for preference, model, ewc in product(("dpo", "ppo"), MODELS, (given.ewc, None)):
        line = f"sft+{preference} {model} ewc={'off' if ewc is None else 'on'} {digest(preference, model, ewc=ewc)}"
        differs = expected is not None and line not in expected
        status |= differs
        print(f"{line}  DIFFERS" if differs else line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
