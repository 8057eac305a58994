"""A track: what belongs to one objective of a run, and how tracks are made of what the user gives."""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hbat.config.fields import nearest, shown
from hbat.config.hbat import HBATConfig
from hbat.data.check import check_dataset
from hbat.data.faults import RowCheck
from hbat.data.load import DatasetError, for_all
from hbat.data.origin import Origin
from hbat.data.sources import load_splits
from hbat.data.template import Limits, row_fit
from hbat.objectives.built_in import build_args, resolve
from hbat.objectives.objective import Objective
from hbat.objectives.rewards import with_rewards
from hbat.ppo.rollouts.prompts import context_length
from hbat.state.plan import Stage, part_bounds, part_indices

_ARGUMENTS = ("train_dataset", "eval_dataset")
_MEDIA = ("image", "images")  # the columns by which TRL recognises vision data


@dataclass(frozen=True)
class Track:
    """One objective of a run with its trainer's arguments and its rows.

    Attributes:
        objective: What its stages minimise.
        args: Arguments of its trainer, as the user gave them; every stage derives its own.
        train_dataset: All training rows, without those that were dropped.
        eval_dataset: Evaluation rows; None if there are none.
        callbacks: The user's callbacks of its trainers.
        origins: By data set where its rows come from.
        shares: Share of the training rows of each round; None if all have equal ones.
        dropped: Number of training rows that were dropped as faulty.
    """

    objective: Objective
    args: TrainingArguments
    train_dataset: Dataset
    eval_dataset: Dataset | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    shares: Sequence[float] | None = None
    dropped: int = 0

    @property
    def name(self) -> str:
        """Name of the objective."""
        return self.objective.name

    def __str__(self) -> str:
        rows, args = len(self.train_dataset), self.args
        length = f"{args.max_steps} steps a stage" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        named = f" of {', '.join(self.sources)}" if self.sources else ""
        return f"{self.name}: {rows:,} rows{named}, {length}, learning rate {args.learning_rate:g}"

    @property
    def sources(self) -> list[str]:
        """Names of the files or data sets on the Hub that the training rows come from."""
        return self.origins["train_dataset"].sources if "train_dataset" in self.origins else []

    @property
    def engines(self) -> Collection[str]:
        """Engines that the objective was tested with."""
        return self.objective.engines

    def part(self, stage: Stage, seed: int) -> Dataset:
        """The part of the training rows that a stage trains on."""
        return self.train_dataset.select(self.part_indices(stage.num_rounds, stage.part, seed))

    def part_indices(self, num_rounds: int, part: int, seed: int) -> list[int]:
        """Numbers of the training rows of a part."""
        return part_indices(len(self.train_dataset), num_rounds, part, seed, self.shares)

    def part_size(self, num_rounds: int, part: int) -> int:
        """Number of training rows of a part."""
        start, end = part_bounds(len(self.train_dataset), num_rounds, part, self.shares)
        return end - start

    def rows_ahead(self, num_rounds: int, part: int) -> float:
        """Rows of a part and all later ones, per row of the part."""
        return num_rounds - part if self.shares is None else math.fsum(self.shares[part:]) / self.shares[part]

    def estimated_steps(self, num_rounds: int, part: int = 0) -> int:
        """Estimate the optimizer steps of the stage on a part; packing and filters can make them fewer."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        count = len(self.train_dataset)
        rows = math.ceil(count / num_rounds) if self.shares is None else round(count * self.shares[part])
        return math.ceil(self.objective.epoch_steps(self.args, rows) * self.args.num_train_epochs)


def build_tracks(
    config: HBATConfig,
    train_dataset: Mapping[str, Any],
    eval_dataset: Mapping[str, Any] | None,
    reward_funcs: Any = None,
    reward_processing_classes: Any = None,
    callbacks: Sequence[TrainerCallback] | Mapping[str, Sequence[TrainerCallback]] | None = None,
) -> list[Track]:
    """Build the arguments of every objective, and check every row of its data sets.

    Args:
        config: The run's configuration.
        train_dataset: Training rows by objective, or where they are: what `load_rows` takes or gave.
        eval_dataset: Evaluation rows by objective, for all or some of them, likewise.
        reward_funcs: Rewards of the online objectives.
        reward_processing_classes: Tokenizers of reward models.
        callbacks: Callbacks of all trainers, or by objective.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a section is faulty, an objective has no training rows, or a key is no objective.
        DatasetError: If a data set cannot be trained on.
        NotImplementedError: Under an engine that is not supported.
    """
    objectives = with_rewards(resolve(config), reward_funcs, reward_processing_classes)
    names = [objective.name for objective in objectives]
    args = build_args(objectives, config)
    _check_keys(train_dataset, "train_dataset", names)
    if missing := [name for name in names if name not in train_dataset]:
        raise ValueError(f"`train_dataset` has no rows for {missing}; its keys are {list(train_dataset)}.")
    evaluation = eval_dataset or {}
    _check_keys(evaluation, "eval_dataset", names)
    if isinstance(callbacks, Mapping):
        _check_keys(callbacks, "callbacks", names)
    else:
        callbacks = dict.fromkeys(names, callbacks or ())

    def track(objective: Objective) -> Track:
        name, check = objective.name, objective.row_check()
        labels = [f"{argument}[{name!r}]" for argument in _ARGUMENTS]
        train, *evaluated = load_splits(train_dataset[name], evaluation.get(name), names=labels, check=check)
        whole = Track(
            objective,
            args[name],
            train.dataset,
            evaluated[0].dataset if evaluated else None,
            [*callbacks.get(name, ())],
            dict(zip(_ARGUMENTS, [train.origin, *(rows.origin for rows in evaluated)], strict=False)),
            None if config.shares is None else config.shares[name],
        )
        return _checked(whole, config, check)

    return for_all(objectives, track)


def one_chat_template(tracks: Sequence[Track], config: HBATConfig) -> tuple[str | None, list[Track]]:
    """Take the chat template out of the sections: one tokenizer serves all objectives, so it is set once for the run.

    Returns:
        The run's `chat_template`, and the tracks without a `chat_template_path`.

    Raises:
        ValueError: If a section names another one than the run or another section.
    """
    found = {} if config.chat_template is None else {"chat_template": config.chat_template}
    for track in tracks:
        if path := getattr(track.args, "chat_template_path", None):
            found[f"{track.name}.chat_template_path"] = path
    if len(set(found.values())) > 1:
        listed = " and ".join(f"`{name}` is {shown(value)}" for name, value in found.items())
        raise ValueError(f"{listed}, but all objectives share one tokenizer. Set `chat_template` alone.")
    bare = [
        replace(track, args=replace(track.args, chat_template_path=None))  # type: ignore[call-arg]
        if f"{track.name}.chat_template_path" in found
        else track
        for track in tracks
    ]
    return next(iter(found.values()), None), bare


def fit(tracks: Sequence[Track], config: HBATConfig, model: Any, tokenizer: Any) -> list[Track]:
    """Check rows that are good in themselves against model and tokenizer, or processor.

    Raises:
        DatasetError: If columns or rows do not fit.
    """
    is_processor = hasattr(tokenizer, "tokenizer")

    def fitted(track: Track) -> Track:
        check = track.objective.row_check()
        if check is not None and not is_processor:
            _refuse_media(track)
        return _checked(track, config, row_fit(check, None if is_processor else tokenizer, _limits(track, model)))

    return for_all(tracks, fitted)


def _limits(track: Track, model: Any) -> Limits:
    tokens = model.get_input_embeddings()
    vocabulary = int(getattr(tokens, "num_embeddings", 0) or sys.maxsize)
    context, args = context_length(model.config), track.args
    if context is None:
        return Limits(vocabulary)
    completion = getattr(args, "max_completion_length", None)
    if completion is not None:
        room = max(0, context - completion)
        why = f"with `max_completion_length` {completion} the model's context of {context} leaves room for {room}"
        return Limits(vocabulary, room, why)
    # Learned positions have an end (OPT's table has two more); others (RoPE) only get worse beyond the context.
    # TRL cuts at `max_length`.
    learned = any(
        isinstance(module, nn.Embedding) and module is not tokens and context <= module.num_embeddings <= context + 2
        for module in model.modules()
    )
    length = getattr(args, "max_length", None)
    if not learned or (length is not None and length <= context):
        return Limits(vocabulary)
    return Limits(
        vocabulary, context, f"the model has {context} positions. Set `{track.name}.max_length` to {context}"
    )


def _check_keys(given: object, argument: str, names: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{argument}` is a {type(given).__name__}; give a mapping from objective to data set, with the keys "
            f"{list(names)}."
        )
    for name in given:
        if name not in names:
            raise ValueError(f"`{argument}` has the key {name!r}, which no stage trains.{nearest(str(name), names)}")


def _checked(track: Track, config: HBATConfig, check: RowCheck | None) -> Track:
    minimum = track.objective.minimum_rows(track.args)

    def kept(argument: str) -> tuple[Dataset, Origin]:
        is_train = argument == "train_dataset"
        concerns = getattr(check, "concerns", None)  # a check against the tokenizer looks at messages and tokens alone
        return check_dataset(
            getattr(track, argument),
            name=f"{argument}[{track.name!r}]",
            faults=None if concerns is not None and not concerns(getattr(track, argument)) else check,
            num_rounds=config.num_rounds if is_train and not track.shares else 1,
            rows_per_round=minimum if is_train else 1,
            on_bad_rows=config.on_bad_rows,
            origin=track.origins[argument],
        )

    given = [argument for argument in _ARGUMENTS if getattr(track, argument) is not None]
    (train, _), *held_out = rows = for_all(given, kept)
    for number, share in enumerate(track.shares or ()):
        start, end = part_bounds(len(train), config.num_rounds, number, track.shares)
        if share > 0 and (size := end - start) < minimum:
            raise DatasetError(
                f"train_dataset[{track.name!r}] has too few rows: {share:g} of its {len(train)} (`rounds[{number}]`) "
                f"is {size}, but a stage needs at least {minimum}. Raise the share or provide more data."
            )
    return replace(
        track,
        train_dataset=train,
        eval_dataset=held_out[0][0] if held_out else None,
        origins=dict(zip(given, (origin for _, origin in rows), strict=True)),
        dropped=track.dropped + len(track.train_dataset) - len(train),
    )


def _refuse_media(track: Track) -> None:
    for argument in _ARGUMENTS:
        dataset = getattr(track, argument)
        found = [column for column in _MEDIA if dataset is not None and column in dataset.column_names]
        if found:
            raise DatasetError(
                f"{argument}[{track.name!r}] has the column `{found[0]}`, but the model has a tokenizer and no "
                "processor, so it reads only text. Remove the column, or pass the processor of a vision-language "
                "model as `processing_class`."
            )
