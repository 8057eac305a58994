"""Replay: rows of the SFT objective on which the stages of the other objectives train too."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerState

from hbat.data.load import DatasetError
from hbat.engines.checks import policy_of
from hbat.engines.engine import Engine
from hbat.engines.environment import kept_environment
from hbat.engines.processes import process_count
from hbat.ewc.fisher import IGNORED
from hbat.objectives.track import Track
from hbat.stages.builder import TrainerBuilder
from hbat.state.plan import Stage


def prepare_replay(
    stage: Stage, track: Track, source: Track, builder: TrainerBuilder, *, share: float, seed: int
) -> "Replay | None":
    """Choose and tokenize the rows of `source` that a stage of `track` replays, before its trainer is built.

    Returns:
        The stage's replay, to be bound to its trainer; None while no part of SFT's rows was dealt.

    Raises:
        DatasetError: If TRL leaves no row to train on.
    """
    args, given = track.args, source.train_dataset
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * process_count()
    rounds = range(stage.part + 1)
    order = [row for number in rounds for row in source.part_indices(stage.num_rounds, number, seed)]
    if not order:
        return None
    random.Random(seed + stage.index).shuffle(order)  # noqa: S311 - a seeded order, not cryptography
    order = order[: math.ceil(share * batch * track.estimated_steps(stage.num_rounds, stage.part))]
    with kept_environment():
        # TRL's SFTTrainer tokenizes when it is built, so template, masks and truncation are those of SFT's own stages.
        of_sft: Any = source.args
        alone = replace(of_sft, packing=False, padding_free=False, eval_strategy="no")  # a packed row is many
        with builder.building(replace(source, args=alone), train_dataset=given.select(order)) as trainer:
            rows: Any = trainer.train_dataset
            collate = trainer.data_collator
    if not len(rows):
        raise DatasetError(f"{stage}: `sft.max_length` is {alone.max_length}, which leaves no tokens to replay.")
    return Replay(rows, collate, share=share, batch=batch)


class Replay(TrainerCallback):
    r"""Adds the gradient of $m_t / B \cdot L_{SFT}$, over $m_t$ replayed rows, to that of optimizer step t.

    With B rows in a step, $m_t = \lfloor (t + 1) s B \rfloor - \lfloor t s B \rfloor$ for the share s: s B on average,
    each with the weight of one of the B. $L_{SFT}$ is the mean cross-entropy of their tokens, as in TRL's SFTTrainer.
    The rows depend on the step alone.

    Args:
        rows: Rows that TRL's SFTTrainer has tokenized, in the order in which they are replayed, again and again.
        collate: Its data collator.
        share: Replayed rows per row of the task's, s.
        batch: Rows of an optimizer step over all processes, B.
    """

    def __init__(self, rows: Sequence[Any], collate: Callable[..., Any], *, share: float, batch: int) -> None:
        self._rows = rows
        self._collate = collate
        self._per_step = share * batch
        self._batch = batch
        self._losses: list[Tensor] = []

    def bind(self, trainer: Trainer, engine: Engine) -> None:
        """Attach to a trainer as its first callback, so that every reporter sees the added log entry."""
        self._trainer = trainer
        self._engine = engine
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Act before clipping, after callbacks that are bound later: these see the task's gradient alone."""
        self._engine.before_clipping(self._trainer, self._add_gradient)

    def _add_gradient(self) -> None:
        accelerator, step = self._trainer.accelerator, self._trainer.state.global_step
        first, last = int(self._per_step * step), int(self._per_step * (step + 1))
        if first == last:
            return
        batches = self._batches(range(first + accelerator.process_index, last, accelerator.num_processes))
        tokens = torch.zeros((), device=accelerator.device)
        for batch in batches:
            tokens += (batch["labels"][:, 1:] != IGNORED).sum()
        tokens = accelerator.reduce(tokens, "sum").clamp(min=1)
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        factor = scale * accelerator.num_processes * (last - first) / self._batch
        trained: Any = self._trainer.model
        parameters = list(policy_of(trained).parameters())
        # Frozen tensors have none, but may require one again: TRL switches adapters.
        without = [parameter for parameter in parameters if parameter.grad is None]
        loss = torch.zeros_like(tokens)
        for batch in batches:
            part = self._summed_loss(policy_of(trained), batch) / tokens
            (factor * part).backward()  # the accelerator's would lead here again
            loss += part.detach()
        for parameter in without:
            parameter.grad = None
        if accelerator.num_processes > 1:
            # The task's gradient is the processes' mean already, and stays it when the mean is taken again.
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))
        self._losses.append(loss)

    def _batches(self, numbers: range) -> list[Mapping[str, Tensor]]:
        size, device = self._trainer.args.per_device_train_batch_size, self._trainer.accelerator.device
        rows = [self._rows[number % len(self._rows)] for number in numbers]
        return [send_to_device(self._collate(rows[at : at + size]), device) for at in range(0, len(rows), size)]

    def _summed_loss(self, policy: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        with self._trainer.accelerator.autocast():  # PPO's policy has no patched forward
            logits = policy(**inputs, use_cache=False).logits[:, -labels.shape[1] : -1]  # after virtual tokens
        return cross_entropy(logits.float().mT, labels[:, 1:], ignore_index=IGNORED, reduction="sum")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add `replay/loss`, the mean loss of the steps since the last entry that replayed rows."""
        if logs is not None and "loss" in logs and self._losses:
            mean = self._trainer.accelerator.reduce(torch.stack(self._losses).mean(), "sum")
            logs["replay/loss"] = state.log_history[-1]["replay/loss"] = float(mean)
            self._losses = []
