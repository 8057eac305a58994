"""The lock on a run's folder: one process trains into it at a time. It is free as soon as its holder has ended."""

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hbat.state.files import cannot_write
from hbat.state.manifest import RunStateError

logger = logging.getLogger(__name__)

LOCK_FILE = "hbat.lock"
_PATIENCE = 0.5  # seconds
#: What file systems without locks answer.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, made if missing; raises `RunStateError` if another process holds it."""
    file = folder / LOCK_FILE
    # `is_held` of another process may have it for a moment.
    lock = FileLock(file, timeout=_PATIENCE, fallback_to_soft=False, on_acquired=_sign)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunStateError(
            f"Another process{_holder(file)} trains into `output_dir` {str(folder)!r}. Wait until it ends, stop it, "
            "or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise cannot_write(file, 0, error) from error
        logger.warning(
            "The run's folder cannot be locked (%s): make sure that no second process trains into it.", error
        )
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock, found out without writing anything."""
    import fcntl  # noqa: PLC0415 - Unix alone

    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or the file system has none
        return False
    return False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # locked all the same, if the disk is full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())


def _holder(file: Path) -> str:
    with suppress(OSError):
        if text := file.read_text(encoding="utf-8", errors="replace").strip():
            return f" ({text})"
    return ""
