"""Processes that die and disks that fill up at any operation on files, and files that rot."""

import errno
import itertools
import os
import pathlib
import shutil

import pytest
from safetensors import SafetensorError

from hbat.state import files as storage


class Crash(BaseException):
    """Not an Exception, so that nothing in between can swallow it: a process that dies."""


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """Counts what changes files and raises before or after the n-th of them; a write fails half way through.

    `only` names the operations that count.
    """

    def __init__(self, monkeypatch, *, at, moment="before", raises=Crash, only=None):
        self.count, self._at, self._moment, self._raises = 0, at, moment, raises
        operations = [
            (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (os, "fsync"),
            (shutil, "rmtree"),
        ]  # fmt: skip
        for owner, name in operations:
            if only is None or name in only:
                monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        if only is None or "write" in only:
            monkeypatch.setattr(storage, "save_file", self._counted(storage.save_file, self._half_of_tensors))
            monkeypatch.setattr(pathlib.Path, "open", self._opening(pathlib.Path.open))

    def _counted(self, operation, half=None):
        def call(*args, **kwargs):
            self.count += 1
            fails = self.count == self._at
            if fails and self._moment == "before":
                if half:
                    half(operation, *args, **kwargs)
                raise self._failure(operation)
            result = operation(*args, **kwargs)
            if fails:
                raise self._failure(operation)
            return result

        return call

    def _failure(self, operation):
        if self._raises is full_disk and operation is _SAVE:
            return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return self._raises()

    @staticmethod
    def _half_of_tensors(operation, values, file):
        operation(values, file)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])

    def _opening(self, operation):
        def call(path, mode="r", *args, **kwargs):
            file = operation(path, mode, *args, **kwargs)
            return _CountedFile(file, self._counted(file.write, self._half_of_bytes)) if mode == "wb" else file

        return call

    @staticmethod
    def _half_of_bytes(operation, content):
        operation(content[: len(content) // 2])


_SAVE = storage.save_file
#: Those that a full disk or one that may not be written to can refuse.
WRITE_OPERATIONS = ("write", "fsync", "replace", "mkdir")


class _CountedFile:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def at_every_operation(action, **options):
    """Call `action(number)` with a fault at its first operation on files, then its second, and so on to its end.

    Yields the number and the error after each; what the action prepares before it calls `arm()` counts for nothing.
    """
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = []

            def arm(number=number, monkeypatch=monkeypatch, faults=faults):
                faults.append(Faults(monkeypatch, at=number, **options))

            try:
                action(number, arm)
                error = None
            except BaseException as caught:  # noqa: BLE001 - the test looks at it
                error = caught
        if faults[0].count < number:
            return
        if error is not None:  # else what was run has dealt with it
            yield number, error


# --- rot -------------------------------------------------------------------------------------------------------------


def remove(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(bytes(content))


DAMAGES = {"missing": remove, "truncated": truncate, "zeroed": zero, "one bit flipped": flip_a_bit}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
