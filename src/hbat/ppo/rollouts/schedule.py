"""Which prompts a rollout takes, and which rows a mini-batch.

A pure function of seed and position, so that a run that was cut off goes on with the same ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LARGE_PRIME = 1_000_003  # keeps the seeds of neighbouring rollouts apart


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a micro-step stands.

    Attributes:
        rollout: Number of its rollout, from 0.
        update: Optimizer step within the rollout.
        part: Micro-batch within the optimizer step.
    """

    rollout: int
    update: int
    part: int

    @property
    def begins_rollout(self) -> bool:
        """Whether a rollout must be made first."""
        return self.update == 0 and self.part == 0


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """The order of prompts and rows.

    Attributes:
        prompts: Number of prompts.
        size: Prompts of a rollout on each process.
        passes: Passes over a rollout.
        micro_size: Rows of a micro-batch.
        micro_steps: Micro-batches of an optimizer step.
        processes: Number of processes.
        process: This process.
        seed: Seed of the order.
    """

    prompts: int
    size: int
    passes: int
    micro_size: int
    micro_steps: int
    processes: int
    process: int
    seed: int

    @classmethod
    def of_training(cls, args: Any, prompts: int) -> "RolloutSchedule":
        """Take the sizes out of a training's options.

        Args:
            args: A `PPOConfig`.
            prompts: Number of prompts.

        Returns:
            The schedule of this process.
        """
        return cls(
            prompts=prompts,
            size=args.rollout_size,
            passes=args.num_ppo_epochs,
            micro_size=args.per_device_train_batch_size,
            micro_steps=args.gradient_accumulation_steps,
            processes=args.world_size,
            process=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of a pass."""
        return self.size // (self.micro_size * self.micro_steps)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.updates_per_pass * self.passes

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts of one pass over the prompts; the prompts left over wait for the next, in another order."""
        return self.prompts // (self.size * self.processes)

    @property
    def micro_steps_per_epoch(self) -> int:
        """Micro-steps of one pass over the prompts."""
        return self.rollouts_per_epoch * self.updates_per_rollout * self.micro_steps

    def position(self, micro_step: int) -> Position:
        """Place a micro-step.

        Args:
            micro_step: Micro-steps before it since the start of training.

        Returns:
            Its place.
        """
        step, part = divmod(micro_step, self.micro_steps)
        rollout, update = divmod(step, self.updates_per_rollout)
        return Position(rollout=rollout, update=update, part=part)

    def prompt_indices(self, rollout: int) -> list[int]:
        """Choose this process's prompts of a rollout.

        Args:
            rollout: Number of the rollout.

        Returns:
            Indices of prompts; all processes' together are distinct.
        """
        epoch, number = divmod(rollout, self.rollouts_per_epoch)
        order = torch.randperm(self.prompts, generator=self._generator(epoch))
        first = (number * self.processes + self.process) * self.size
        indices: list[int] = order[first : first + self.size].tolist()
        return indices

    def row_indices(self, position: Position) -> Tensor:
        """Choose the rows of a micro-batch, or of all micro-batches of its optimizer step.

        Args:
            position: The micro-step.

        Returns:
            Row numbers of the optimizer step, shape `[micro_steps, micro_size]`.
        """
        number, update = divmod(position.update, self.updates_per_pass)
        generator = self._generator(_LARGE_PRIME + position.rollout * self.passes + number)
        order = torch.randperm(self.size, generator=generator)
        return order.view(self.updates_per_pass, self.micro_steps, self.micro_size)[update]

    def sampling_seed(self, rollout: int) -> int:
        """Seed of the completions that this process samples.

        Args:
            rollout: Number of the rollout.

        Returns:
            A seed that no other rollout of this process or another one has.
        """
        return (self.seed * _LARGE_PRIME + rollout * self.processes + self.process) % 2**63

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * _LARGE_PRIME + number) % 2**63)
