"""Files that run code when they are unpickled, to prove that nobody does."""

import pickle
from pathlib import Path

import torch


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def plant(file, marker, form):
    """Write such a file: a bare pickle, or as `torch.save` writes it, alone or among tensors."""
    evil = Evil(marker)
    if form == "pickle":
        Path(file).write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save({"state": {0: evil}, "param_groups": [], "weight": torch.zeros(2)}, file)
