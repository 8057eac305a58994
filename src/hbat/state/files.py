"""Atomic writes, checksums, and the error for files that cannot be written."""

import errno
import hashlib
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

#: Errors of the disk, not of the program.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
#: `torch.save` (2.13) reports a full disk in these words, without an errno.
_TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


class StorageError(OSError):
    """A file cannot be written. What was on disk before is untouched, and the run can be resumed from it."""


# --- atomic writes ---------------------------------------------------------------------------------------------------


def write_json(path: Path, values: object) -> None:
    """Write plain values as a JSON file: all of it or nothing."""
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file: all of it or nothing."""
    with _replacing(path, len(content)) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, all of it or nothing; no two tensors may share memory."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _replacing(path, sum(tensor.nbytes for tensor in contiguous.values())) as temporary:
        save_file(contiguous, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # frees the space that the next attempt needs
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, size, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- errors of the disk ----------------------------------------------------------------------------------------------


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Raise errors of the disk as a `StorageError` that names `folder`, which transformers writes into meanwhile."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, StorageError) or not _is_of_the_disk(error):
            raise
        raise cannot_write(folder, None, error) from error


def cannot_write(path: Path, size: int | None, error: Exception) -> StorageError:
    """Make the error for a file (or folder) of `size` bytes, or of unknown size, that cannot be written."""
    number = _errno(error)
    reason = os.strerror(number) if number else str(error)
    free = ""
    with suppress(OSError):
        nearest = next(parent for parent in path.parents if parent.exists())
        free = f", with {_readable(shutil.disk_usage(nearest).free)} free there"
    shown = "" if size is None else f" ({_readable(size)})"
    failure = StorageError(
        f"{path}{shown} cannot be written{free}: {reason}. What was on disk before is untouched; resume with "
        "`resume_from_checkpoint=True` (`--resume`) once there is space and permission."
    )
    failure.errno = number
    return failure


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return bool(_TORCH_WRITE_ERROR.search(str(error)))
    return _errno(error) in _DISK_ERRORS


def _errno(error: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors reports it
    if found:
        return int(found[1])
    return error.errno if isinstance(error, OSError) else None


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


# --- checksums -------------------------------------------------------------------------------------------------------

# Measured on 1 GiB in the page cache: 2.3-3.5 GB/s, where reading alone takes 4.4 GB/s, SHA-256 0.5 and CRC-32 1.1.
# It finds damage; it is no protection against an attacker.
_ALGORITHM = "xxh3_128"


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and checksum of a file, as plain values."""
    with path.open("rb", buffering=0) as file:
        found = hashlib.file_digest(file, xxhash.xxh3_128)
        return {"bytes": file.tell(), _ALGORITHM: found.hexdigest()}


def fault(path: Path, expected: Mapping[str, Any] | None) -> str | None:
    """How a file differs from its recorded `checksum`, as a predicate such as `is missing`; None if it does not."""
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
    """Checksum of plain values, the same however a JSON file lays them out."""
    plain = json.loads(json.dumps(values))  # turns keys that are numbers into text before they are sorted
    return xxhash.xxh3_128(json.dumps(plain, sort_keys=True).encode()).hexdigest()
