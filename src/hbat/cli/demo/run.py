"""`hbat demo`: HBAT beside two-stage training on a generated task, on a CPU in minutes, without a network."""

import json
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm

from hbat.cli.demo.base_model import build_model, build_tokenizer, prepare_base
from hbat.cli.demo.preference import Kind, data, judge, learning_rates, section
from hbat.cli.demo.results import Outcome, Point, draw_trade_off, print_results
from hbat.cli.demo.scoring import evaluate
from hbat.cli.demo.settings import DemoSettings
from hbat.cli.demo.task import instruction_rows, test_prompts
from hbat.config.hbat import HBATConfig
from hbat.state.manifest import STATE_FILE
from hbat.trainer import HBATTrainer

#: Large enough that every step of the command runs, too small to learn anything.
QUICK = DemoSettings(
    seeds=1, base_steps=40, instruction_rows=128, preference_rows=128, test_prompts=64, sft_epochs=1, ppo_rollout=32
)
_TEST_SEED = 1_000_003  # far from the seeds of training rows


@dataclass(frozen=True)
class Method:
    """One training method of the comparison."""

    name: str
    folder: str
    learning_rate: float  # of the preference stages
    options: dict[str, Any] = field(default_factory=dict)  # fields of HBATConfig


def methods(preference: Kind, settings: DemoSettings) -> list[Method]:
    """List HBAT with its defaults, and two-stage training at several preference learning rates."""
    name, rates = preference.upper(), learning_rates(preference, settings)
    # One round without EWC is two-stage training with plain TRL trainers, bit for bit.
    two_stage = {"num_rounds": 1, "ewc": None, "optimizer_state": "reset"}
    return [
        Method(f"HBAT, {name} {_short(rates[0])}", "hbat", rates[0]),
        *(Method(f"two-stage, {name} {_short(rate)}", f"two-stage-{_short(rate)}", rate, two_stage) for rate in rates),
    ]


def _short(rate: float) -> str:
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def run(output_dir: Path, seed: int = 0, quick: bool = False, preference: Kind = "dpo") -> None:
    """Pretrain a base model, train it with each method on several seeds, print and save the scores."""
    start = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and TRL's, about their next release
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of saving a model
    settings = QUICK if quick else DemoSettings()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # results do not depend on the number of cores; the model is too small to gain from more
    try:
        outcomes = _Comparison(output_dir, seed, settings, preference).run()
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    results = {
        "seed": seed,
        "preference": preference,
        "settings": asdict(settings),
        "methods": [asdict(outcome) for outcome in outcomes],
        "seconds": seconds,
    }
    file = output_dir / "demo.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot = draw_trade_off(outcomes, output_dir / "trade-off.png")
    if quick:
        print("Too few steps and rows to learn anything: this shows that everything runs, and no more.")  # noqa: T201 - output
    print_results(outcomes, seconds=seconds, files=[file, *([plot] if plot else []), output_dir / "hbat"])


class _Comparison:
    def __init__(self, output_dir: Path, seed: int, settings: DemoSettings, preference: Kind) -> None:
        self._output_dir, self._seed, self._settings, self._preference = output_dir, seed, settings, preference
        self._tokenizer = build_tokenizer()

    def run(self) -> list[Outcome]:
        base = self._base().state_dict()
        compared = methods(self._preference, self._settings)
        outcomes = [Outcome(method.name) for method in compared]
        for seed in range(self._seed, self._seed + self._settings.seeds):
            for method, outcome in zip(compared, outcomes, strict=True):
                print(f"\n{method.name}, seed {seed}", file=sys.stderr)  # noqa: T201 - a command's own output
                model = build_model(self._seed)
                model.load_state_dict(base)
                self._train(method, model, seed, outcome)
        return outcomes

    def _base(self) -> Any:
        settings = self._settings
        with tqdm(total=settings.base_steps, desc="base model", unit="step", file=sys.stderr) as bar:

            def progress(step: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
                bar.update(step - bar.n)

            return prepare_base(
                self._seed,
                steps=settings.base_steps,
                batch_size=settings.base_batch_size,
                learning_rate=settings.base_learning_rate,
                progress=progress,
            )

    def _train(self, method: Method, model: Any, seed: int, outcome: Outcome) -> None:
        settings, preference = self._settings, self._preference
        folder = self._output_dir / method.folder / f"seed-{seed}"
        if (folder / STATE_FILE).exists():
            shutil.rmtree(folder)  # of an earlier demo
        rows = {
            "sft": Dataset.from_list(instruction_rows(seed, settings.instruction_rows)),
            preference: data(preference, seed, settings.preference_rows),
        }
        config = HBATConfig(
            output_dir=str(folder),
            objectives=list(rows),
            seed=seed,
            **self._sections(method.learning_rate, seed),
            **method.options,
        )
        rewards = judge if preference == "ppo" else None
        trainer = HBATTrainer(
            model, config, train_dataset=rows, processing_class=self._tokenizer, reward_funcs=rewards
        )
        outcome.steps = trainer.train().global_step
        trainer.save_model()
        prompts = test_prompts(seed + _TEST_SEED, settings.test_prompts)
        points = []
        for end_weight in (0.0, *settings.end_weights):
            trainer.move_to(end_weight)
            greedy, sampled = (evaluate(model, self._tokenizer, prompts, sample=sample) for sample in (False, True))
            points.append(Point(end_weight, greedy, sampled))
        outcome.runs.append(points)

    def _sections(self, learning_rate: float, seed: int) -> dict[str, Any]:
        settings = self._settings
        shared = {
            "adam_beta2": settings.adam_beta2,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 16,
            "lr_scheduler_type": "cosine",
            "save_strategy": "no",
            "seed": seed,
            "use_cpu": True,
            "warmup_steps": settings.warmup_steps,
        }
        sft = {
            "learning_rate": settings.sft_learning_rate,
            "num_train_epochs": settings.sft_epochs,
            "per_device_train_batch_size": settings.batch_size,
        }
        own = section(self._preference, settings) | {"learning_rate": learning_rate}
        return {"sft": shared | sft, self._preference: shared | own}
