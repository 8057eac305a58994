"""Rank, barrier, broadcast."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

_FAILED = -(1 << 62)


def is_launched_with(variable: str) -> bool:
    """Whether `accelerate launch` set a variable to true, in any spelling that accelerate takes."""
    # accelerate's own reader raises at other words.
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "on", "y", "t"}


def is_main_process() -> bool:
    """Whether this is rank 0."""
    # Asking accelerate would initialise its state before a stage's arguments can.
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """World size."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Barrier."""
    if _are_connected():
        torch.distributed.barrier()


def decided_by_main(decide: Callable[[], int | None]) -> int:
    """Broadcast the number (None: 0) that `decide` returns on rank 0, where it is called alone, to every rank.

    Raises:
        RuntimeError: On the other ranks, if `decide` raised an error on rank 0.
    """
    if not _are_connected():
        return decide() or 0
    decided = torch.tensor(_FAILED, device=_device())
    try:
        if is_main_process():
            decided.fill_(decide() or 0)
    finally:
        torch.distributed.broadcast(decided, src=0)  # after an error too, or the other ranks would wait forever
    if int(decided) == _FAILED:
        raise RuntimeError("Rank 0 stopped with an error; see its message.")
    return int(decided)


def largest_of_all(number: int | Tensor) -> int:
    """The largest of the numbers that all processes give. Collective: call on every rank."""
    if _are_connected():
        number = torch.as_tensor(number, device=_device()).int()
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number)


def _are_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    speaks_cpu = any(backend in torch.distributed.get_backend() for backend in ("gloo", "mpi"))
    return torch.device("cpu") if speaks_cpu or accelerator is None else accelerator


def weights_come_later() -> bool:
    """Whether this process's weights are placeholders until the model is sharded (RAM-efficient loading of FSDP)."""
    return is_launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING") and not is_main_process()
