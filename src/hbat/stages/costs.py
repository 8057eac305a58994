"""StageCosts: what a stage spends its time on, and how many tokens it trains on."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from hbat.state.clock import Clock, reset_peak_memory


class StageCosts(TrainerCallback):
    """Measures one stage. The last of its trainer's callbacks: what the others do at an event belongs to the event.

    Args:
        clock: The run's clock, which is told the seconds of evaluating and saving inside the stage.

    Attributes:
        resumed_at: The step from which it was resumed, or 0.
        tokens: Tokens since then as the trainer counts them, over all processes; 0 if it does not.
    """

    def __init__(self, clock: Clock) -> None:
        self.resumed_at = self.tokens = 0
        self._clock = clock
        self._tokens_before = 0
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        reset_peak_memory()
        # TRL's online trainers count on from a checkpoint, its others from 0.
        self.resumed_at, self._tokens_before = state.global_step, int(state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time what comes until the next event, which is no training."""
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take over the trainer's count of tokens."""
        counted = int((logs or {}).get("num_tokens", 0))
        self.tokens = max(self.tokens, counted - self._tokens_before if counted >= self._tokens_before else counted)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the evaluation."""
        self._count("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the checkpoint."""
        self._count("saving")

    def _count(self, what: str) -> None:
        now = time.perf_counter()
        if self._mark:  # an evaluation before the first step has no beginning here
            self._clock.add(what, now - self._mark)
        self._mark = now
