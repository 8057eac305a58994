"""Ends a run at a signal: saves at the end of the step, and exits with a status that says why."""

import _thread
import builtins
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from hbat.engines.processes import largest_of_all

logger = logging.getLogger(__name__)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MESSAGE = "\n%s: saving at the end of the step, then ending. A second signal ends at once."
_AT_ONCE = (
    b"\nhbat: ended at once, nothing more was saved. On disk are the start of the stage under way and its last "
    b"checkpoint, from where the run resumes.\n"
)
_STATUS = 128  # plus the signal's number, as shells give it


class RunInterrupted(BaseException):
    """A signal ended the run; everything is saved.

    Raised as a `SystemExit`, which uncaught ends the process with the status 128 plus the signal's number: 143 after
    SIGTERM, 130 after SIGINT. In a notebook, which has no process to end, as a `KeyboardInterrupt`.

    Attributes:
        signal: The signal.
    """

    signal: signal.Signals


class _ProcessEnds(RunInterrupted, SystemExit):
    pass


class _CellEnds(RunInterrupted, KeyboardInterrupt):
    pass


def interrupted(number: int) -> RunInterrupted:
    """Make the exception for a signal."""
    received = signal.Signals(number)
    in_notebook = hasattr(builtins, "get_ipython")  # which IPython sets while a cell runs
    error = (_CellEnds if in_notebook else _ProcessEnds)(
        f"The run was stopped by {received.name} and is saved. `train(resume_from_checkpoint=True)` resumes it."
    )
    error.signal = received
    if isinstance(error, SystemExit):
        error.code = _STATUS + number
    return error


class StopRequest:
    """Remembers the first signal; the second one ends the process at once."""

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGTERM and SIGINT within the block, if this is the main thread: Python allows no other."""
        self._number = 0
        here = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, self._receive) for number in _SIGNALS} if here else {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._number = 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            os.write(2, _AT_ONCE)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._number = number
        # The handler runs between two instructions of the main thread, which may hold a lock that logging wants.
        _thread.start_new_thread(logger.warning, (_MESSAGE, signal.Signals(number).name))

    def agreed(self) -> int:
        """Number of the signal that any process got; 0 for none. Collective: call on every rank."""
        self._number = largest_of_all(self._number)
        return self._number

    def raise_if_agreed(self) -> None:
        """End the run if any process got a signal. Collective: call on every rank.

        Raises:
            RunInterrupted: If one did.
        """
        number = self.agreed()
        if number:
            error: RunInterrupted = interrupted(number)
            raise error


class StopAtStep(TrainerCallback):
    """Saves a checkpoint and ends a stage at the end of the step in which a signal came.

    Args:
        request: Where signals are remembered.
        saves: Whether a checkpoint can be resumed from; otherwise the run resumes at the stage's start.
    """

    def __init__(self, request: StopRequest, *, saves: bool = True) -> None:
        self._request = request
        self._saves = saves
        self.stopped = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, unless the stage is over anyway."""
        if self._request.agreed() and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = self._saves
            self.stopped = True


class StopAtPrediction(TrainerCallback):
    """Ends the run within an evaluation between stages, where everything is saved already."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run if a signal came. Collective: as every evaluation step."""
        self._request.raise_if_agreed()
