"""Files that are there whole or not at all, and the error where one cannot be written."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class StorageError(OSError):
    """A file cannot be written. What was there before is untouched, and a run can go on from it."""


def write_json(path: Path, values: object) -> None:
    """Write a JSON file that is there whole or not at all.

    Args:
        path: The file.
        values: Plain values.

    Raises:
        StorageError: If it cannot be written.
    """
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Args:
        path: The file.
        content: What it holds.

    Raises:
        StorageError: If it cannot be written.
    """
    with _replacing(path, len(content)) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all.

    Args:
        path: The file.
        tensors: Tensors by name; each is stored once, so no two may share memory.

    Raises:
        StorageError: If it cannot be written.
    """
    contiguous = {name: each.detach().contiguous() for name, each in tensors.items()}
    with _replacing(path, sum(each.nbytes for each in contiguous.values())) as temporary:
        save_file(contiguous, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        raise _given_up(path, size, temporary, error) from error
    try:
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _given_up(path, size, temporary, error) from error


def _given_up(path: Path, size: int, temporary: Path, error: Exception) -> StorageError:
    with suppress(OSError):  # it is the room that the next try needs
        temporary.unlink(missing_ok=True)
    return cannot_write(path, size, error)


def cannot_write(path: Path, size: int, error: Exception) -> StorageError:
    """Say that a file cannot be written.

    Args:
        path: The file.
        size: Bytes that it takes.
        error: What the system or safetensors raised.

    Returns:
        The error to raise.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors raises errors of its own
        number = int(found[1])
    why = os.strerror(number) if number else str(error)
    free = ""
    with suppress(OSError):
        nearest = next(each for each in path.parents if each.exists())
        free = f", with {_readable(shutil.disk_usage(nearest).free)} free there"
    message = (
        f"{path} ({_readable(size)}) cannot be written{free}: {why}. What was on disk before is untouched; go on with "
        "`resume_from_checkpoint=True` (`--resume`) once there is room and permission."
    )
    raised = StorageError(message)
    raised.errno = number
    return raised


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
