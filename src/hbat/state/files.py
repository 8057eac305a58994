"""Files that are there whole or not at all, and the error where one cannot be written."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

#: Errors of a disk rather than of a program.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


#: How `torch.save` (2.13) puts it, without a number, where the disk is full.
_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


class StorageError(OSError):
    """A file cannot be written. What was there before is untouched, and a run can go on from it."""


@contextmanager
def written_by_the_host(folder: Path) -> Iterator[None]:
    """Say which folder is meant where the host's own files do not fit into it.

    Args:
        folder: The folder that the host writes into.

    Yields:
        Nothing; let the host write inside.

    Raises:
        StorageError: If the disk is full, broken or may not be written to. Other errors stay as they are.
    """  # noqa: DOC501 - those that stay
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, StorageError) or not _is_of_the_disk(error):
            raise
        failure = cannot_write(folder, None, error)
        raise failure from error


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


def cannot_write(path: Path, size: int | None, error: Exception) -> StorageError:
    """Say that a file cannot be written.

    Args:
        path: The file, or a folder of the host's.
        size: Bytes that it takes; None where that is not known.
        error: What the system or safetensors raised.

    Returns:
        The error to raise.
    """
    number = _number(error)
    why = os.strerror(number) if number else str(error)
    free = ""
    with suppress(OSError):
        nearest = next(each for each in path.parents if each.exists())
        free = f", with {_readable(shutil.disk_usage(nearest).free)} free there"
    shown = "" if size is None else f" ({_readable(size)})"
    message = (
        f"{path}{shown} cannot be written{free}: {why}. What was on disk before is untouched; go on with "
        "`resume_from_checkpoint=True` (`--resume`) once there is room and permission."
    )
    raised = StorageError(message)
    raised.errno = number
    return raised


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return bool(_OF_TORCH.search(str(error)))
    return _number(error) in _OF_THE_DISK


def _number(error: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors raises errors of its own
    if found:
        return int(found[1])
    return error.errno if isinstance(error, OSError) else None


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


# Measured on 1 GiB in the page cache: 2.3-3.5 GB/s with any block from 64 KiB on, where reading alone takes 4.4 GB/s,
# SHA-256 0.5 and CRC-32 1.1. It finds faults of disks and people; it is no protection against an attacker.
_ALGORITHM = "xxh3_128"


_BLOCK = 1 << 22


def checksum(path: Path) -> dict[str, Any]:
    """Measure a file.

    Args:
        path: The file.

    Returns:
        Its size in bytes and its checksum, as plain values.

    Raises:
        OSError: If it cannot be read.
    """
    digest, block = xxhash.xxh3_128(), bytearray(_BLOCK)
    view, size = memoryview(block), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
            size += count
    return {"bytes": size, _ALGORITHM: digest.hexdigest()}


def fault(path: Path, expected: Mapping[str, Any] | None) -> str | None:
    """Say what is wrong with a file.

    Args:
        path: The file.
        expected: What `checksum` gave when it was written; None where nobody measured it.

    Returns:
        Words to put after the file's name, or None where it is what was written.
    """
    if expected is None:
        return "has no recorded checksum"
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            return f"has {size} bytes instead of {expected.get('bytes')}"
        return None if checksum(path) == dict(expected) else "is not what was written: its checksum differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"


def digest(values: Any) -> str:
    """Checksum of plain values.

    Args:
        values: What JSON can hold.

    Returns:
        The same text for the same values, however they are laid out in a file.
    """
    plain = json.loads(json.dumps(values))  # keys that are numbers become text, and are sorted as such
    return xxhash.xxh3_128(json.dumps(plain, sort_keys=True).encode()).hexdigest()
