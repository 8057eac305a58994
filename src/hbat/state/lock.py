"""A lock on the folder of a run, which the system lets go of when the process that holds it dies, however it dies."""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbat.state.files import StorageError, cannot_write
from hbat.state.manifest import RunStateError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)


LOCK_FILE = "hbat.lock"


_held: set[int] = set()


_warned: set[str] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Args:
        folder: The folder; made where it is missing.

    Yields:
        Nothing.

    Raises:
        RunStateError: If another process holds the lock.
        StorageError: If the folder cannot be written to.
    """
    if fcntl is None:
        _warn("this platform has no file locks")
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        failure: StorageError = cannot_write(folder / LOCK_FILE, 0, error)
        raise failure from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunStateError(
                f"Another process{_holder(descriptor)} trains into `output_dir` {str(folder)!r}. Wait for its end, "
                "stop it, or choose another folder."
            ) from error
        except OSError as error:
            _warn(str(error))
        else:
            with contextlib.suppress(OSError):  # on a full disk it is locked all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    number = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return f" ({number})" if number.isdigit() else ""


def _warn(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        logger.warning("The run's folder cannot be locked (%s): make sure that no second process trains into it.", why)


def _let_go() -> None:
    # A worker that was forked off holds the lock as well, and would go on holding it after this process was killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
