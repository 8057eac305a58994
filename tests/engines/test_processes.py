import os
import pathlib
import subprocess
import sys

import pytest
from accelerate.utils import parse_flag_from_env

import hbat
from hbat.engines.processes import decided_by_main, is_launched_with, is_main_process, process_count, wait_for_everyone

PROGRAM = """
import pathlib, sys, time
import torch
from hbat.engines.processes import decided_by_main, is_main_process, process_count, wait_for_everyone

torch.distributed.init_process_group("gloo")
assert torch.distributed.get_world_size() == 2
file = pathlib.Path(sys.argv[1])
if is_main_process():
    time.sleep(1.0)
    file.write_text("here")
wait_for_everyone()
assert file.read_text() == "here"
assert is_main_process() == (torch.distributed.get_rank() == 0)
assert process_count() == 2
main = is_main_process()
assert decided_by_main(lambda: 7 if main else 1 / 0) == 7
assert decided_by_main(lambda: -1) == -1
try:
    decided_by_main(lambda: 1 / 0)
except ZeroDivisionError:
    assert main
except RuntimeError as error:
    assert not main and str(error) == "Rank 0 stopped with an error; see its message."
else:
    raise AssertionError
torch.distributed.destroy_process_group()
"""


def test_a_single_process_is_the_main_one_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    wait_for_everyone()
    assert decided_by_main(lambda: 5) == 5
    assert process_count() == 1


@pytest.mark.parametrize(("rank", "main"), [("0", True), ("1", False)])
def test_rank_zero_is_the_main_process(monkeypatch, rank, main):
    monkeypatch.setenv("RANK", rank)
    assert is_main_process() is main


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "on", "y", "t", "0", "false", "off", "no", "", None])
def test_the_launchers_words_are_read_as_the_launcher_reads_them(monkeypatch, word):
    monkeypatch.delenv("ACCELERATE_USE_X", raising=False)
    if word is not None:
        monkeypatch.setenv("ACCELERATE_USE_X", word)
    expected = parse_flag_from_env("ACCELERATE_USE_X") if word else False  # it raises at an empty word
    assert is_launched_with("ACCELERATE_USE_X") == expected


def test_two_processes_wait_for_what_the_main_one_writes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    source = str(pathlib.Path(hbat.__file__).parents[1])
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, "written"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        text=True,
        timeout=120,
    )
    assert launched.returncode == 0, launched.stderr
