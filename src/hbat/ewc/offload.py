"""Tensors that stay in the main memory while an accelerator works through them piece by piece. Owns no formula."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_Key = tuple[str, int]  # a tensor's name, and which of its pieces


def page_locked(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to where a device can fetch it without making the host wait.

    Args:
        tensor: A tensor.
        device: The device that will fetch it.

    Returns:
        It on the CPU, in page-locked memory for an accelerator; the tensor itself where it is there.
    """
    host = tensor.detach().to("cpu")
    return host if device.type == "cpu" else host.contiguous().pin_memory()


@dataclass
class _Slot:
    memory: Tensor  # bytes, on the device
    filled: Any  # event of the copying stream
    used: Any  # event of the computing stream
    key: _Key | None = None


class Offloaded(Mapping[str, Tensor | float]):
    """Tensors in the main memory by name, of which two pieces at a time lie on a device.

    While one piece is used the next is fetched on a stream of its own, and after the last one the first: so the next
    walk finds two pieces there that came during the optimizer's step and the forward pass. Walks should go in the
    mapping's order; others are right, but wait for their pieces.

    Args:
        tensors: Tensors by name; numbers stay numbers.
        device: Where their pieces are used.
        piece: Elements of a piece at most.
    """

    def __init__(self, tensors: Mapping[str, Tensor | float], device: torch.device, piece: int) -> None:
        kept = {name: page_locked(each, device) for name, each in tensors.items() if isinstance(each, Tensor)}
        self._tensors: dict[str, Tensor | float] = {**tensors, **kept}
        self._pieces: dict[str, tuple[Tensor, ...]] = {
            name: each.reshape(-1).split(max(1, min(each.numel(), piece))) for name, each in kept.items()
        }
        keys = [(name, index) for name, pieces in self._pieces.items() for index in range(len(pieces))]
        self._following = dict(zip(keys, keys[1:] + keys[:1], strict=True))
        self._streams: Any = torch.get_device_module(device)  # the CPU's has streams too, which do nothing
        self._copying = self._streams.Stream()
        size = max((self._piece(key).nbytes for key in keys), default=0)
        self._slots = [self._slot(size, device) for _ in range(2)]

    def _slot(self, size: int, device: torch.device) -> _Slot:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        slot = _Slot(memory, self._streams.Event(), self._streams.Event())
        slot.used.record(self._streams.current_stream())  # what had the memory before may still be at work on it
        return slot

    def __getitem__(self, name: str) -> Tensor | float:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Fetch a tensor piece by piece.

        Args:
            name: Its name.

        Yields:
            Flat pieces on the device. A piece may be used until the next one is asked for.
        """
        for index in range(len(self._pieces[name])):
            key = name, index
            slot = self._filled(key)
            slot.filled.wait(self._streams.current_stream())
            yield self._view(slot, key)
            slot.used.record(self._streams.current_stream())
            # The other slot has what follows, or gets it now; this one gets what follows that.
            following = self._following[key]
            self._filled(following, keep=slot)
            after_it = self._following[following]
            if slot.key != after_it:
                self._fill(slot, after_it)

    def close(self) -> None:
        """Let the device finish what was fetched ahead, before its memory serves something else."""
        self._streams.current_stream().wait_stream(self._copying)

    def _filled(self, key: _Key, keep: _Slot | None = None) -> _Slot:
        for slot in self._slots:
            if slot.key == key:
                return slot
        free = next(slot for slot in self._slots if slot is not keep)
        self._fill(free, key)
        return free

    def _fill(self, slot: _Slot, key: _Key) -> None:
        slot.used.wait(self._copying)
        with self._streams.stream(self._copying):
            self._view(slot, key).copy_(self._piece(key), non_blocking=True)
        slot.filled.record(self._copying)
        slot.key = key

    def _piece(self, key: _Key) -> Tensor:
        name, index = key
        return self._pieces[name][index]

    def _view(self, slot: _Slot, key: _Key) -> Tensor:
        piece = self._piece(key)
        view: Tensor = slot.memory[: piece.nbytes].view(piece.dtype)
        return view
