"""One run of the evidence: a base model, a regime's data, a method; trained by `HBATTrainer`, scored on its way."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from mixed import train_mixed
from model import SECTION, Scores, build_tokenizer, evaluate, load_base, tokenized
from spec import REGIMES, Regime, Spec
from task import demonstrations, pairs, test_prompts, utility
from transformers import TrainerCallback

from hbat import HBATConfig, HBATTrainer
from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.task import Row
from hbat.engines.checks import policy_of

ROWS = 2048  # of demonstrations, which are seen twice, and of pairs, which are seen once
PROMPTS = 512  # of a test set
SHARES = (0.25, 0.5, 0.75, 1.0)  # points of the averaging line, from the last stage's start to its end


class Watch(TrainerCallback):
    """Keeps the last stage's start and end, and scores the model on its way.

    Args:
        score: From a model to its scores.
        every: Optimizer steps between scores; 0 for none.
    """

    def __init__(self, score: Any = None, every: int = 0) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.end: dict[str, torch.Tensor] = {}
        self.curve: list[dict[str, Any]] = []
        self.scoring = 0.0
        self._score, self._every, self._before = score, every, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the start."""
        self.start = _weights(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score where it is time."""
        if self._every and state.global_step % self._every == 0:
            begin = time.perf_counter()
            scores = self._score(policy_of(kwargs["model"]))
            self.curve.append({"step": self._before + state.global_step, "scores": scores})
            self.scoring += time.perf_counter() - begin

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the end."""
        self.end = _weights(kwargs["model"])
        self._before += state.global_step


def train(spec: Spec, folder: Path, size: int = ROWS, prompts: int = PROMPTS) -> dict[str, Any]:
    """Train one run and score it.

    Args:
        spec: The run.
        folder: Where the base models are.
        size: Rows of each objective.
        prompts: Prompts of the test set.

    Returns:
        Its record.
    """
    begin = time.perf_counter()
    regime, tokenizer = REGIMES[spec.regime], build_tokenizer()
    questions = test_prompts(spec.seed, prompts)

    def score(model: Any) -> Scores:
        scores = evaluate(model, tokenizer, questions, spec.seed, spec.temperatures)
        return {heat: _grouped(by_task, regime) for heat, by_task in scores.items()}

    model, watch = load_base(spec.base, spec.seed, folder), Watch(score, spec.score_every)
    with tempfile.TemporaryDirectory() as work:
        for index in range(len(regime.parts)):
            rows = _rows(spec, index, size // len(regime.parts), tokenizer)
            if spec.mixed:
                watch.start = _weights(model)
                train_mixed(model, tokenizer, rows, rate=spec.rate, seed=spec.seed, **spec.mixed)
                watch.end = _weights(model)
                continue
            options = _options(spec, work, index)
            trainer = HBATTrainer(
                model, HBATConfig(**options), rows, processing_class=tokenizer, callbacks=[watch],
                reward_funcs=_judge(regime) if spec.preference == "ppo" else None,
            )  # fmt: skip
            trainer.train()
    trained = time.perf_counter() - watch.scoring
    scores = {}
    for share in (0.0, *SHARES):  # 0 is where the last stage starts
        _place(model, watch, share)
        scores[f"{share:g}"] = score(model)
    return asdict(spec) | {
        "key": spec.key,
        "scores": scores,
        "curve": watch.curve,
        "seconds": {"train": trained - begin, "all": time.perf_counter() - begin},
    }


def _options(spec: Spec, work: str, part: int) -> dict[str, Any]:
    common = SECTION | {
        "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "seed": spec.seed, "warmup_steps": 5
    }  # fmt: skip
    options: dict[str, Any] = {
        "output_dir": f"{work}/part{part}", "objectives": ["sft", *filter(None, [spec.preference])],
        "num_rounds": 1, "seed": spec.seed, "disable_tqdm": True,
        "sft": common | {"learning_rate": 1e-3, "num_train_epochs": 2},
    }  # fmt: skip
    own = {"dpo": {"beta": 0.1}, "ppo": _PPO}
    if spec.preference:
        rate = {"learning_rate": spec.rate, "num_train_epochs": 1}
        options[spec.preference] = common | rate | own[spec.preference] | spec.section
    if part:
        options["continue_from"] = f"{work}/part{part - 1}"
    return options | spec.options


_PPO = {
    "kl_coef": 0.05, "max_completion_length": LONGEST_ANSWER, "num_ppo_epochs": 4, "rollout_batch_size": 128,
    "per_device_train_batch_size": 32,
}  # fmt: skip


def _rows(spec: Spec, part: int, size: int, tokenizer: Any) -> dict[str, Dataset]:
    regime = REGIMES[spec.regime]
    tasks = regime.parts[part]
    paired = tuple(task for task in tasks if task in regime.paired)
    earlier = tuple(task for other in regime.parts[:part] for task in other)
    old = round(size * spec.old_rows) if earlier else 0

    def mixed(generate: Any, own: Sequence[str]) -> list[Row]:
        rows: list[Row] = generate(spec.seed, size - old, regime.conflict, tuple(own))
        return rows + (generate(spec.seed, old, regime.conflict, earlier) if old else [])

    found = {"sft": tokenized(mixed(demonstrations, tasks), tokenizer)}
    if spec.preference:
        found[spec.preference] = Dataset.from_list(mixed(pairs, paired))
    if spec.preference == "ppo":
        found["ppo"] = found["ppo"].select_columns("prompt")
    return found


def _judge(regime: Regime) -> Any:
    def judge(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        pairs_ = zip(prompts, completions, strict=True)
        return [utility(prompt, answer, regime.conflict) for prompt, answer in pairs_]

    return judge


def _grouped(by_task: dict[str, dict[str, float]], regime: Regime) -> dict[str, dict[str, float]]:
    # Every task has the same number of prompts.
    metrics = next(iter(by_task.values()))
    return {
        name: {metric: sum(by_task[task][metric] for task in tasks) / len(tasks) for metric in metrics}
        for name, tasks in regime.groups
    }


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy_of(model).named_parameters()}


@torch.no_grad()
def _place(model: Any, watch: Watch, share: float) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(watch.start[name] + share * (watch.end[name] - watch.start[name]))
