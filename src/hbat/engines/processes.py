"""Who writes, who decides, and who waits, where several processes train together."""

import os
from collections.abc import Callable

import torch

_FAILED = -(1 << 62)


def is_launched_with(variable: str) -> bool:
    """Whether `accelerate launch` was told to use something.

    Args:
        variable: The variable of the environment in which it says so.

    Returns:
        True for the words that accelerate takes for yes. (Its own reader raises at words that it does not know.)
    """
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "on", "y", "t"}


def is_main_process() -> bool:
    """Whether this process writes for all.

    Returns:
        True in a single process and on rank 0.
    """
    # Asking accelerate would initialise its state before a stage's configuration can.
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Number of processes that train together.

    Returns:
        1 in a single process.
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Let no process go on before all are here, so that none reads what another is writing."""
    if _are_connected():
        torch.distributed.barrier()


def decided_by_main(decide: Callable[[], int]) -> int:
    """Let the main process decide for all, as where one alone looks at what lies on disk.

    Args:
        decide: Called on the main process; what it raises is raised there, and an error about it on the others.

    Returns:
        The same number on every process.

    Raises:
        RuntimeError: If the main process could not decide.
    """
    if not _are_connected():
        return decide()
    decided = torch.tensor(_FAILED, device=_device())
    try:
        if is_main_process():
            decided.fill_(decide())
    finally:
        torch.distributed.broadcast(decided, src=0)  # after an error too, so that nobody waits for ever
    if int(decided) == _FAILED:
        raise RuntimeError("The main process stopped; its message says why.")
    return int(decided)


def _are_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    speaks_cpu = any(each in torch.distributed.get_backend() for each in ("gloo", "mpi"))
    return torch.device("cpu") if speaks_cpu or accelerator is None else accelerator


def weights_come_later() -> bool:
    """Whether this process's weights are placeholders until the model is sharded (RAM-efficient loading of FSDP)."""
    return is_launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING") and not is_main_process()
