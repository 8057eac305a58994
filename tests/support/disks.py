"""Disks that are full, read-only, or limited in the size of a file."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(folder, *options, source="tmpfs"):
    folder.mkdir(exist_ok=True)
    try:
        done = subprocess.run(["mount", *options, source, str(folder)], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a tensor that was read maps its file


@contextlib.contextmanager
def files_of_at_most(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
