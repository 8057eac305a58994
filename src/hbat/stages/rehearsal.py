"""Tries every objective's trainer before the first stage, so that a run fails at once and not after hours."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback
from transformers.integrations import get_reporting_integration_callbacks

from hbat.config.hbat import HBATConfig
from hbat.data.check import without_media
from hbat.objectives.track import Track
from hbat.stages.builder import TrainerBuilder
from hbat.stages.dropped_rows import report_dropped_rows, rows_left
from hbat.stages.learning_rate import extend_schedule
from hbat.state.plan import plan

#: Rows of which the shortest are tried, for speed: a step on a long one takes seconds on a CPU.
_LOOKED_AT = 64
#: Options for which transformers and TRL import a package only when training begins, and its name for pip.
_IMPORTED_LATE = {"use_liger_kernel": ("liger_kernel", "liger-kernel")}


def rehearse(tracks: Sequence[Track], config: HBATConfig, builder: TrainerBuilder) -> None:
    """Build each objective's trainer, optimizer and schedule, try a step and an evaluation of few rows.

    The stage's start must have been taken.

    Raises:
        ValueError: If a trainer or a batch cannot be built, or a callback would fail; the message names the objective.
        ImportError: If a package is missing that an option needs.
    """
    _require_packages(tracks, config)
    _require_evaluation(tracks)
    for track in tracks:
        rows: dict[str, Any] = {"train_dataset": track.train_dataset}
        if track.eval_dataset is not None:  # the trainer asks for it where its arguments set `eval_strategy`
            rows["eval_dataset"] = track.eval_dataset
        if not track.objective.rehearses_all_rows:
            counts = {"train_dataset": track.objective.minimum_rows(track.args), "eval_dataset": 1}
            rows = {name: short_rows(dataset, counts[name]) for name, dataset in rows.items()}
        with _named(track.name), builder.building(track, **rows) as trainer:
            kind = config.lr_schedule_of(track.name)
            extend_schedule(
                trainer, kind, round_index=0, num_rounds=config.num_rounds, steps_before=0, ahead=config.num_rounds
            )
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            _try_batches(trainer, computes=builder.engine.computes_at_once, rewarded=track.objective.takes_rewards)
            _try_rewards(trainer)
            dropped = rows_left(trainer, "train") == 0 or (len(rows) > 1 and rows_left(trainer, "eval") == 0)
        if dropped:
            _require_rows(track, config, builder)


def _require_rows(track: Track, config: HBATConfig, builder: TrainerBuilder) -> None:
    """Build the trainer of each stage on all of its rows, where it drops the first: it may drop all of them."""
    for stage in plan(config.num_rounds, config.objective_names, shares=config.shares):
        if stage.objective == track.name:
            part = track.part(stage, config.seed)
            with builder.building(track, train_dataset=part, eval_dataset=track.eval_dataset) as trainer:
                report_dropped_rows(trainer, "train", len(part), track.name, str(stage))
                if track.eval_dataset is not None:
                    report_dropped_rows(trainer, "eval", len(track.eval_dataset), track.name, "evaluation")


def _try_batches(trainer: Any, *, computes: bool, rewarded: bool) -> None:
    # Of few rows TRL may have dropped all.
    if len(trainer.train_dataset):
        batch = next(iter(trainer.get_train_dataloader()))
        if computes and not rewarded:
            _enable_checkpointing(trainer)
            trainer.model.train()
            with torch.random.fork_rng():
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))  # noqa: SLF001 - as the next
                trainer.accelerator.backward(loss)
    if trainer.eval_dataset is not None and len(trainer.eval_dataset) and not rewarded:
        batch = next(iter(trainer.get_eval_dataloader()))
        if computes:
            with torch.random.fork_rng():
                trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)


def _try_rewards(trainer: Any) -> None:
    rewards = getattr(trainer, "rewards", None)
    if rewards is not None and getattr(trainer, "scores_rows", True):
        rewards.rehearse(trainer.train_dataset[0], trainer.processing_class)


def _enable_checkpointing(trainer: Any) -> None:
    """As `Trainer.train` does before its first step."""
    if trainer.args.gradient_checkpointing:
        options = dict(trainer.args.gradient_checkpointing_kwargs or {})
        if hasattr(trainer.model, "activation_checkpointing_enable"):  # from transformers 5.23
            own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
        else:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def _require_packages(tracks: Sequence[Track], config: HBATConfig) -> None:
    for track in tracks:
        for option, (module, package) in _IMPORTED_LATE.items():
            if getattr(track.args, option, False) and importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"`{track.name}.{option}` is set, but {package} is not installed. Install it with `pip install "
                    f"{package}`, or remove the option."
                )
    reporters = [config.report_to] if isinstance(config.report_to, str) else list(config.report_to or [])
    for reporter in reporters:
        try:
            for callback in get_reporting_integration_callbacks(reporter):  # "all" and "none" have a meaning
                callback()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"`report_to` has {reporter!r}, which cannot be used: {error}") from error


def _require_evaluation(tracks: Sequence[Track]) -> None:
    for track in tracks:
        strategy = str(getattr(track.args.eval_strategy, "value", "no"))
        if strategy != "no" and track.eval_dataset is None:
            raise ValueError(
                f"`{track.name}.eval_strategy` is {strategy!r}, but `eval_dataset` (in YAML `eval_datasets`) has no "
                f"rows for {track.name!r}. Give some, or remove it: objectives are evaluated after every stage."
            )
        if not any(isinstance(callback, EarlyStoppingCallback) for callback in track.callbacks):
            continue
        wanted = {
            f"`{track.name}.eval_strategy`": strategy != "no",
            f"`{track.name}.metric_for_best_model`": track.args.metric_for_best_model,
            f"`eval_dataset[{track.name!r}]`": track.eval_dataset,
        }
        if missing := [name for name, given in wanted.items() if not given]:
            raise ValueError(
                f"`callbacks` has an `EarlyStoppingCallback` for {track.name!r}, which needs {' and '.join(missing)}. "
                "Set them, or give callbacks by objective: `callbacks={'sft': [...]}`."
            )


@contextmanager
def _named(objective: str) -> Iterator[None]:
    # Trainers raise anything from anywhere, and seldom say which section or data set they mean.
    try:
        yield
    except (ImportError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError | TypeError) and objective in text:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"The trainer of {objective!r} cannot be built from its section and its rows: {kind}{text}"
        ) from error


def short_rows(dataset: Dataset, count: int) -> Dataset:
    """The `count` shortest of the first rows of a data set, repeated where there are too few."""
    looked_at = dataset.select(range(min(len(dataset), max(count, _LOOKED_AT))))
    lengths = [len(str(row)) for row in without_media(looked_at)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return looked_at.select([order[index % len(order)] for index in range(count)])
