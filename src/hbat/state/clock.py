"""What the time of a run is spent on."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GIB = 2**30


class Clock:
    """Measures the seconds of a run, lap by lap, and what they are spent on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Count the seconds within the block, those of an accelerator too, as spent on something."""
        begun = _now()
        try:
            yield
        finally:
            self.add(what, _now() - begun)

    def add(self, what: str, seconds: float) -> None:
        """Count seconds as spent on something."""
        self._spent[what] += seconds

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap, as `seconds`, and those of them that were spent on something."""
        now = _now()
        lap = {"seconds": now - self._begun, **self._spent}
        self._begun = now
        self._spent.clear()
        return lap


def _now() -> float:
    if torch.cuda.is_available():  # kernels run behind
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak_memory() -> None:
    """Begin to measure the peak memory of the GPU anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Peak of the memory that tensors took on the GPU, in GiB; without one, of the process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    if sys.platform == "win32":
        return 0.0
    import resource  # noqa: PLC0415 - Unix alone

    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
