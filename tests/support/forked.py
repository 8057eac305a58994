"""Runs a program in two processes that are forked from one: what both import is imported once.

`python forked.py PROGRAM ARGUMENTS` stands for `torchrun --standalone --nproc_per_node 2 PROGRAM ARGUMENTS`.
"""

import importlib
import os
import runpy
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

PROCESSES = 2


def work(rank, port):
    """Be one of the processes, as `torchrun` would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": os.read(port, 16).decode()}
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:  # noqa: BLE001 - also SystemExit
        traceback.print_exc()
        return 1
    return 0


def main():
    program = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(program.parent))
    os.environ |= {
        "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    importlib.import_module(program.stem)
    pipes, children = [os.pipe() for _ in range(PROCESSES)], set()
    for rank, (port, _) in enumerate(pipes):
        child = os.fork()
        if not child:
            status = work(rank, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.add(child)
    from torch.distributed import TCPStore  # has a thread, which a fork would lose

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for _, port in pipes:
        os.write(port, str(store.port).encode())
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:  # the others would wait for it
            failed = 1
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(main())
