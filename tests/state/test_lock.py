"""One process trains into a folder at a time, and none that is dead keeps others out."""

import contextlib
import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hbat
from hbat.state.files import StorageError
from hbat.state.folder import RunFolder
from hbat.state.lock import LOCK_FILE, locked
from hbat.state.manifest import RunStateError

fcntl = pytest.importorskip("fcntl")

HOLDER = r"""
import os, sys, time
from pathlib import Path
from hbat.state.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "forks" and os.fork() == 0:
        os.write(1, b"%d\n" % os.getpid())  # in one piece, which print does not promise
        time.sleep(60)
    os.write(1, b"held\n")
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder, what=""):
    environment = os.environ | {"PYTHONPATH": str(Path(hbat.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(folder), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        words = [process.stdout.readline().strip() for _ in range(1 + bool(what))]
        try:
            yield process, next((int(word) for word in words if word.isdigit()), None)
        finally:
            process.kill()


def test_another_process_is_kept_out_and_told_by_whom_until_it_is_killed_though_a_worker_outlives_it(tmp_path):
    with holder(tmp_path, "forks") as (process, worker):
        try:
            message = (
                rf"Another process \(process {process.pid} on {platform.node()}\) trains into `output_dir` "
                rf"'{tmp_path}'\. Wait until it ends, stop it"
            )
            with pytest.raises(RunStateError, match=message), locked(tmp_path):
                pytest.fail("it was let in")
            with locked(tmp_path / "other"):
                pass
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(worker, 0)  # alive
            with locked(tmp_path):
                assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {platform.node()}\n"
        finally:
            os.kill(worker, signal.SIGKILL)


def test_the_end_of_a_run_lets_others_in_whatever_it_was(tmp_path):
    with locked(tmp_path), pytest.raises(RunStateError, match=rf"\(process {os.getpid()} on "), locked(tmp_path):
        pass
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_only_the_main_process_locks(tmp_path):
    main, others, intruder = RunFolder(tmp_path), RunFolder(tmp_path, writes=False), RunFolder(tmp_path)
    with main.locked(), others.locked(), pytest.raises(RunStateError), intruder.locked():
        pass
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("hbat"))
    assert os.strerror(number) in warning
    assert "make sure that no second process trains into it" in warning


def test_a_full_disk_keeps_the_lock_without_the_name_of_its_holder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "ftruncate", full)
    with locked(tmp_path), pytest.raises(RunStateError, match="Another process trains into"), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = rf"{tmp_path}/file/run/{LOCK_FILE} .*cannot be written"
    with pytest.raises(StorageError, match=message), locked(tmp_path / "file" / "run"):
        pass


def test_descriptors_do_not_pile_up(tmp_path):
    def lowest_free():
        descriptor = os.open(tmp_path, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    first = lowest_free()
    for _ in range(5):
        with locked(tmp_path):
            pass
    assert lowest_free() == first
