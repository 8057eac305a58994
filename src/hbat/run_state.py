"""Where a run stands, on disk: one JSON manifest and the tensor files that it names. Nothing is ever unpickled.

    output_dir/
      hbat_state.json           the manifest; its replacement is the commit point of a stage
      state/                    tensors, each file written once under a new name
        weights-003.safetensors       trainable weights at the start of stage 3
        importance-sft-002.safetensors  what `sft` accumulated up to stage 2
        optimizer-sft-002.safetensors   moments that `sft` carries on
        kept-ppo-003.safetensors        what else `ppo` carries on, such as its critic
      stage-003-dpo/            the stage under way: the host's own checkpoints

A file that the manifest does not name belongs to an unfinished step and is removed at the next commit.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_origin

from safetensors.torch import load_file, save_file
from torch import Tensor

from hbat.processes import wait_for_everyone

STATE_FILE = "hbat_state.json"
FORMAT = 1


class RunStateError(ValueError):
    """The output folder holds something that this run cannot go on from."""


@dataclass
class RunState:
    """Where a run stands between two stages.

    Attributes:
        fingerprint: What the run is: configuration and data, as plain values.
        next_stage: Index of the stage that trains next; the number of stages when the run is finished.
        global_step: Optimizer steps so far, over all stages.
        objective_steps: Optimizer steps so far by objective.
        files: Names of the tensor files in `state/` by what they hold.
        evaluations: Rows of the forgetting matrix so far.
        rollbacks: How often a stage was rolled back after a NaN, by its index as text.
    """

    fingerprint: dict[str, Any]
    next_stage: int = 0
    global_step: int = 0
    objective_steps: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: dict[str, int] = field(default_factory=dict)


class RunFolder:
    """The output folder of a run.

    Args:
        path: The folder.
        writes: Whether this process writes; the others only read.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes

    def read(self) -> RunState | None:
        """Read the manifest.

        Returns:
            Where the run stands, or None where the folder holds no run.

        Raises:
            RunStateError: If the manifest cannot be read.
        """
        manifest = self.path / STATE_FILE
        if not manifest.exists():
            return None
        try:
            values = dict(json.loads(manifest.read_text(encoding="utf-8")))
            found = values.pop("format")
            if found == FORMAT:
                return _typed(RunState(**values))
        except (KeyError, TypeError, ValueError) as error:
            raise RunStateError(
                f"{manifest} cannot be read ({error}). Restore it from a backup, or train into another folder."
            ) from error
        raise RunStateError(f"{manifest} has format {found!r}; this version of hbat reads format {FORMAT}.")

    def require_unused(self) -> None:
        """Check that nothing of another run lies in the folder, whose manifest is gone.

        Raises:
            RunStateError: If there is a stage's folder, from which the new run would go on.
        """
        left = sorted(each.name for each in self.path.glob("stage-*"))
        if left:
            raise RunStateError(
                f"`output_dir` {str(self.path)!r} holds {left[0]!r} of another run, but no {STATE_FILE}. Remove what "
                "is left of that run, or choose another folder."
            )

    def commit(self, state: RunState) -> None:
        """Make `state` the run's state and remove the tensor files that it no longer names; all processes wait.

        Args:
            state: Where the run stands now.
        """
        if self._writes:
            self._write_manifest(state)
        wait_for_everyone()

    def _write_manifest(self, state: RunState) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / STATE_FILE, {"format": FORMAT} | asdict(state))
        folder = self.path / "state"
        if folder.is_dir():
            for file in folder.iterdir():
                if file.name not in state.files.values() and not file.is_dir():
                    file.unlink(missing_ok=True)

    def write_tensors(self, state: RunState, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under a new name and note it in `state`, which is not yet committed.

        Args:
            state: The state that will name the file.
            kind: What the tensors are, such as `weights` or `importance-sft`.
            number: Stage that they belong to.
            tensors: Tensors by name.
        """
        name = f"{kind}-{number:03d}.safetensors"
        if self._writes:
            (self.path / "state").mkdir(parents=True, exist_ok=True)
            write_tensors(self.path / "state" / name, tensors)
        state.files[kind] = name

    def read_tensors(self, state: RunState, kind: str) -> dict[str, Tensor]:
        """Read tensors that the manifest names.

        Args:
            state: The run's state.
            kind: What to read.

        Returns:
            Tensors by name on the CPU; empty where there are none of this kind.

        Raises:
            RunStateError: If the file is missing or broken.
        """
        if kind not in state.files:
            return {}
        file = self.path / "state" / state.files[kind]
        try:
            return load_file(file)
        except Exception as error:
            raise RunStateError(f"{file} cannot be read ({error}). The run cannot go on from here.") from error

    def remove_stage(self, name: str) -> None:
        """Remove the folder of a stage that is done.

        Args:
            name: The stage's folder.
        """
        if self._writes:
            shutil.rmtree(self.path / name, ignore_errors=True)


def _typed(state: RunState) -> RunState:
    for each in fields(state):
        value, expected = getattr(state, each.name), get_origin(each.type) or each.type
        if not isinstance(value, cast("type", expected)) or isinstance(value, bool):
            raise TypeError(f"`{each.name}` is {value!r}")
    return state


def write_json(path: Path, values: object) -> None:
    """Write a JSON file that is there whole or not at all.

    Args:
        path: The file.
        values: Plain values.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all.

    Args:
        path: The file.
        tensors: Tensors by name; each is stored once, so no two may share memory.
    """
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: each.detach().contiguous() for name, each in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
