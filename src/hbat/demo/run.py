"""`hbat demo`: HBAT beside two-stage training on a generated task, on a CPU in minutes, without network."""

import dataclasses
import json
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm

from hbat.config import HBATConfig
from hbat.demo.base_model import build_model, build_tokenizer, prepare_base
from hbat.demo.results import Outcome, draw_trade_off, print_results
from hbat.demo.scoring import Scores, evaluate
from hbat.demo.settings import DemoSettings
from hbat.demo.task import instruction_rows, preference_rows, test_prompts
from hbat.run_state import STATE_FILE
from hbat.trainer import HBATTrainer

#: Large enough that every step of the command runs, too small to learn anything.
QUICK = DemoSettings(base_steps=40, instruction_rows=128, preference_rows=128, test_prompts=64, sft_epochs=1)
_TEST_SEED = 1_000_003  # apart from the seeds of training rows


@dataclass(frozen=True)
class Method:
    """One way to train in the comparison.

    Attributes:
        name: Its name in the table.
        folder: Its folder in the demo's output.
        options: Fields of the run's configuration.
        dpo_learning_rate: Largest learning rate of its preference stages.
    """

    name: str
    folder: str
    options: dict[str, Any]
    dpo_learning_rate: float


class _ScoreAfterStage(transformers.TrainerCallback):
    def __init__(self, rows: Any, tokenizer: Any) -> None:
        self.scores: list[Scores] = []
        self._rows, self._tokenizer = rows, tokenizer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scores.append(evaluate(kwargs["model"], self._tokenizer, self._rows))


def methods(settings: DemoSettings) -> list[Method]:
    """List what the demo compares. One round without EWC is two-stage training with plain TRL trainers, to the bit.

    Args:
        settings: Sizes and learning rates.

    Returns:
        HBAT, two-stage training at the same preference learning rate, and two-stage training at a smaller one.
    """
    shared, tuned = settings.dpo_learning_rate, settings.tuned_dpo_learning_rate
    two_stage = {"num_rounds": 1, "ewc": None, "optimizer_state": "reset"}
    return [
        Method(f"HBAT, DPO at {_short(shared)}", "hbat", {"num_rounds": settings.num_rounds}, shared),
        Method(f"two-stage, DPO at {_short(shared)}", "two-stage", two_stage, shared),
        Method(f"two-stage, DPO at {_short(tuned)}", "two-stage-tuned", two_stage, tuned),
    ]


def _short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def run(output_dir: Path, seed: int = 0, quick: bool = False) -> int:
    """Run the demo: prepare a base model, train it three ways, show and save what came out.

    Args:
        output_dir: Folder for the demo's files; an earlier demo's are replaced.
        seed: Seed of data, base model and training.
        quick: Run every step at a size at which nothing is learned.

    Returns:
        Exit status 0.
    """
    begun = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the host's own, about names of its next release
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of saving a model
    settings = QUICK if quick else DemoSettings()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        results = _compare(output_dir, seed, settings)
    finally:
        torch.set_num_threads(threads)
    base, outcomes = results
    seconds = time.perf_counter() - begun
    file = output_dir / "demo.json"
    file.write_text(
        json.dumps(
            {
                "seed": seed,
                "settings": asdict(settings),
                "base": asdict(base),
                "methods": [dataclasses.asdict(each) for each in outcomes],
                "seconds": seconds,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    picture = draw_trade_off(base, outcomes, output_dir / "trade-off.png")
    print_results(base, outcomes, seconds=seconds, files=[file, *([picture] if picture else []), output_dir / "hbat"])
    return 0


def _compare(output_dir: Path, seed: int, settings: DemoSettings) -> tuple[Scores, list[Outcome]]:
    tokenizer = build_tokenizer()
    prompts = test_prompts(seed + _TEST_SEED, settings.test_prompts)
    rows = {
        "sft": Dataset.from_list(instruction_rows(seed, settings.instruction_rows)),
        "dpo": Dataset.from_list(preference_rows(seed, settings.preference_rows)),
    }
    base = _base(seed, settings)
    weights = base.state_dict()
    outcomes = []
    for method in methods(settings):
        print(f"\n{method.name}", file=sys.stderr)  # noqa: T201 - a command's own output
        model = build_model(seed)
        model.load_state_dict(weights)
        outcomes.append(_train(method, model, tokenizer, rows, prompts, output_dir, seed, settings))
    return evaluate(base, tokenizer, prompts), outcomes


def _base(seed: int, settings: DemoSettings) -> Any:
    with tqdm(total=settings.base_steps, desc="base model", unit="step", file=sys.stderr) as bar:

        def progress(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update(step - bar.n)

        return prepare_base(
            seed,
            steps=settings.base_steps,
            batch_size=settings.base_batch_size,
            learning_rate=settings.base_learning_rate,
            progress=progress,
        )


def _train(
    method: Method,
    model: Any,
    tokenizer: Any,
    rows: dict[str, Dataset],
    prompts: Any,
    output_dir: Path,
    seed: int,
    settings: DemoSettings,
) -> Outcome:
    begun = time.perf_counter()
    folder = output_dir / method.folder
    if (folder / STATE_FILE).exists():
        shutil.rmtree(folder)  # an earlier demo's run
    scoring = _ScoreAfterStage(prompts, tokenizer)
    trainer = HBATTrainer(
        model,
        HBATConfig(
            output_dir=str(folder),
            sft=_section(settings, seed, settings.sft_learning_rate, settings.sft_epochs),
            dpo=_section(settings, seed, method.dpo_learning_rate, settings.dpo_epochs) | {"beta": settings.dpo_beta},
            seed=seed,
            **method.options,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[scoring],
    )
    steps = trainer.train().global_step
    trainer.save_model()
    num_rounds = method.options["num_rounds"]
    labels = [f"{name} {index + 1}/{num_rounds}" for index in range(num_rounds) for name in ("SFT", "DPO")]
    return Outcome(method.name, list(zip(labels, scoring.scores, strict=True)), steps, time.perf_counter() - begun)


def _section(settings: DemoSettings, seed: int, learning_rate: float, epochs: int) -> dict[str, Any]:
    return {
        "adam_beta2": settings.adam_beta2,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": learning_rate,
        "logging_steps": 16,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": epochs,
        "per_device_train_batch_size": settings.batch_size,
        "save_strategy": "no",
        "seed": seed,
        "use_cpu": True,
        "warmup_steps": settings.warmup_steps,
    }
