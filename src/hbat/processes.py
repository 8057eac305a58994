"""Who writes, and who waits, where several processes train together."""

import os

import torch


def is_main_process() -> bool:
    """Whether this process writes for all.

    Returns:
        True in a single process and on rank 0.
    """
    # Asking accelerate would initialise its state before a stage's configuration can.
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Let no process go on before all are here, so that none reads what another is writing."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
