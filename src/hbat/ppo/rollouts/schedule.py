"""Which prompts a rollout takes and which rows an update: pure functions of seed and position, so that runs resume."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LARGE_PRIME = 1_000_003  # keeps the seeds of neighboring rollouts apart


@dataclass(frozen=True, kw_only=True)
class Position:
    """A micro-step: number of its rollout, optimizer step in the rollout, micro-batch in the optimizer step."""

    rollout: int
    update: int
    micro_batch: int

    @property
    def begins_rollout(self) -> bool:
        """Whether a rollout must be made first."""
        return self.update == 0 and self.micro_batch == 0


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """The order of prompts and rows on one process."""

    prompts: int
    size: int  # prompts per rollout and process
    passes: int  # over each rollout
    micro_size: int  # rows per micro-batch
    micro_steps: int  # micro-batches per optimizer step
    processes: int
    process: int
    seed: int

    @classmethod
    def of_training(cls, args: Any, prompts: int) -> "RolloutSchedule":
        """The schedule of this process, from a `PPOConfig`."""
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
        """Optimizer steps per pass over a rollout."""
        return self.size // (self.micro_size * self.micro_steps)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.updates_per_pass * self.passes

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts per pass over the prompts; remaining prompts are shuffled into the next."""
        return self.prompts // (self.size * self.processes)

    @property
    def micro_steps_per_epoch(self) -> int:
        """Micro-steps per pass over the prompts."""
        return self.rollouts_per_epoch * self.updates_per_rollout * self.micro_steps

    def position(self, micro_step: int) -> Position:
        """Position of a micro-step, counted from 0 at the start of training."""
        step, micro_batch = divmod(micro_step, self.micro_steps)
        rollout, update = divmod(step, self.updates_per_rollout)
        return Position(rollout=rollout, update=update, micro_batch=micro_batch)

    def prompt_indices(self, rollout: int) -> list[int]:
        """This process's prompts of a rollout; those of all processes are distinct."""
        epoch, number = divmod(rollout, self.rollouts_per_epoch)
        order = torch.randperm(self.prompts, generator=self._generator(epoch))
        first = (number * self.processes + self.process) * self.size
        indices: list[int] = order[first : first + self.size].tolist()
        return indices

    def row_indices(self, position: Position) -> Tensor:
        """Rows of all micro-batches of the optimizer step at a position, shape `[micro_steps, micro_size]`."""
        number, update = divmod(position.update, self.updates_per_pass)
        generator = self._generator(_LARGE_PRIME + position.rollout * self.passes + number)
        order = torch.randperm(self.size, generator=generator)
        return order.view(self.updates_per_pass, self.micro_steps, self.micro_size)[update]

    def sampling_seed(self, rollout: int) -> int:
        """Seed of this process's completions, different for every rollout and process."""
        return (self.seed * _LARGE_PRIME + rollout * self.processes + self.process) % 2**63

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * _LARGE_PRIME + number) % 2**63)
