"""One process trains into a folder at a time, and none that is dead keeps others out."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hbat
from hbat.state import lock as run_lock
from hbat.state.files import StorageError
from hbat.state.folder import RunFolder
from hbat.state.lock import LOCK_FILE, locked
from hbat.state.manifest import RunStateError

fcntl = pytest.importorskip("fcntl")

HOLDER = r"""
import os, sys, time
from pathlib import Path
from hbat.run_lock import locked
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
            yield process, next((int(each) for each in words if each.isdigit()), None)
        finally:
            process.kill()


def test_another_process_is_kept_out_and_told_by_whom(tmp_path):
    with holder(tmp_path) as (process, _):
        message = (
            rf"Another process \({process.pid}\) trains into `output_dir` '{tmp_path}'\. Wait for its end, stop it"
        )
        with pytest.raises(RunStateError, match=message), locked(tmp_path):
            pytest.fail("it was let in")
        with locked(tmp_path / "other"):
            pass


def test_a_process_that_was_killed_keeps_nobody_out(tmp_path):
    with holder(tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_a_worker_that_outlives_the_process_that_was_killed_keeps_nobody_out(tmp_path):
    with holder(tmp_path, "forks") as (process, worker):
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)  # alive
        try:
            with locked(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_the_end_of_a_run_lets_others_in_whatever_it_was(tmp_path):
    with locked(tmp_path), pytest.raises(RunStateError, match=rf"\({os.getpid()}\)"), locked(tmp_path):
        pass
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_only_the_main_process_locks(tmp_path):
    main, others, intruder = RunFolder(tmp_path), RunFolder(tmp_path, writes=False), RunFolder(tmp_path)
    with main.locked(), others.locked(), pytest.raises(RunStateError), intruder.locked():
        pass
    assert [each.name for each in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with locked(tmp_path):
            pass
    (warning,) = caplog.records
    assert os.strerror(number) in warning.getMessage()
    assert "make sure that no second process trains into it" in warning.getMessage()


def test_a_platform_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "_warned", set())
    monkeypatch.setattr(run_lock, "fcntl", None)
    for _ in range(2):
        with locked(tmp_path):
            pass
    assert len(caplog.records) == 1


def test_a_full_disk_keeps_the_lock_and_leaves_out_the_number(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path), pytest.raises(RunStateError, match="Another process trains into"), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = rf"{tmp_path}/file/run/{LOCK_FILE} .*cannot be written"
    with pytest.raises(StorageError, match=message), locked(tmp_path / "file" / "run"):
        pass


def test_descriptors_do_not_pile_up(tmp_path):
    first = os.open(tmp_path, os.O_RDONLY)
    os.close(first)
    for _ in range(5):
        with locked(tmp_path):
            pass
    again = os.open(tmp_path, os.O_RDONLY)
    os.close(again)
    assert again == first
    assert run_lock._held == set()  # noqa: SLF001
