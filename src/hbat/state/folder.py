"""The folder of a run: which of its states are kept, and from which one a run is resumed. Nothing is ever unpickled.

    output_dir/
      hbat_state.json           the manifest; its replacement is the commit point of a stage
      hbat_state.previous.json  that of the stage before, and so on up to `keep_states`
      state/                    tensors, each file written once under a new name
        weights-003.safetensors         trainable weights at the start of stage 3
        importance-sft-002.safetensors  what `sft` accumulated up to stage 2
        optimizer-sft-002.safetensors   moments that `sft` carries to its next stage
        kept-ppo-003.safetensors        what else `ppo` carries, such as its critic
      stage-003-dpo/            the stage under way: checkpoints of transformers

A file that no manifest names belongs to an unfinished step and is removed at the next commit.
"""

import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hbat.engines.processes import decided_by_main, wait_for_everyone
from hbat.engines.sharded import whole_tensors
from hbat.state.files import checksum, fault, write_tensors
from hbat.state.history import TENSORS, KeptStates
from hbat.state.lock import locked
from hbat.state.manifest import STATE_FILE, DamagedStateError, RunState, RunStateError, decode

logger = logging.getLogger(__name__)

_STAGE = re.compile(r"stage-(\d+)-.+")


def tensor_file(kind: str, number: int) -> str:
    """Name of the file of a kind of tensors that belongs to a stage."""
    return f"{kind}-{number:03d}.safetensors"


class RunFolder:
    """The output folder of a run.

    Args:
        path: The folder.
        writes: Whether this process writes; the others only read.
        keeps: Number of complete states that are kept.
    """

    def __init__(self, path: str | Path, *, writes: bool = True, keeps: int = 2) -> None:
        self.path = Path(path)
        self._writes = writes
        self._states = KeptStates(self.path, keeps)
        self._seen_whole: set[str] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; raises `RunStateError` if another process trains into it."""
        with ExitStack() as stack:

            def lock() -> None:
                if self._writes:
                    stack.enter_context(locked(self.path))

            decided_by_main(lock)
            yield

    # --- reading ---------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Whether there is a manifest, complete or not."""
        return bool(self._states.ages())

    def read(self) -> RunState | None:
        """Read the newest complete state; None without a run. Raises `RunStateError` if none is complete."""
        age = decided_by_main(self._newest_complete)
        return None if age < 0 else self._states.resume_from(age)

    def read_newest(self) -> RunState:
        """Read the newest state and no older one; raises `DamagedStateError` if it or a file of it is damaged."""
        state = decode(self._states.manifest(0))

        def check() -> None:
            for kind in state.files:
                self.require_whole(state, kind)

        decided_by_main(check)
        return state

    def _newest_complete(self) -> int:
        damages: list[str] = []
        for age in range(max(self._states.ages(), default=-1) + 1):
            try:
                state = decode(self._states.manifest(age))
                for kind in state.files:
                    # The initial weights are the same in all states, and only some runs need them.
                    if kind != "initial":
                        self.require_whole(state, kind)
            except DamagedStateError as error:
                damages.append(str(error))
                continue
            if damages:
                logger.warning(
                    "%s The run is resumed from its last complete state, at the start of stage %d; what came after it "
                    "is trained again.",
                    " ".join(dict.fromkeys(damages)),
                    state.next_stage,
                )
            return age
        if damages:
            raise RunStateError(
                f"`output_dir` {str(self.path)!r} holds no complete state of its run: "
                f"{' '.join(dict.fromkeys(damages))} Restore these files from a backup, or train into another folder."
            )
        return -1

    def states(self) -> Iterator[RunState]:
        """Read the states on disk, newest first; `DamagedStateError` at a damaged one ends nothing."""
        return map(decode, map(self._states.manifest, self._states.ages()))

    def require_whole(self, state: RunState, kind: str) -> None:
        """Raise `DamagedStateError` if the tensor file of a kind is not what was written."""
        name = state.files[kind]
        if name not in state.checksums and not self._writes:  # the main process wrote it, in this very run
            return
        wrong = fault(self.path / TENSORS / name, state.checksums.get(name))
        if wrong is not None:
            raise DamagedStateError(f"{self.path / TENSORS / name} {wrong}.")
        self._seen_whole.add(name)

    def read_tensors(self, state: RunState, kind: str) -> dict[str, Tensor]:
        """Read tensors of a kind, such as `importance-sft`, onto the CPU by name; none if the state has none.

        Raises:
            DamagedStateError: If the file is not what was written.
        """
        if kind not in state.files:
            return {}
        if state.files[kind] not in self._seen_whole:
            self.require_whole(state, kind)
        self._seen_whole.discard(state.files[kind])  # a file that was whole once may be damaged by the next read
        file = self.path / TENSORS / state.files[kind]
        try:
            return load_file(file)
        except Exception as error:
            raise DamagedStateError(f"{file} cannot be read ({error}).") from error

    def require_unused(self, expected: Collection[str] = ()) -> None:
        """Raise `RunStateError` if the folder, which has no manifest, holds stages or tensors of a run."""
        # A run that was cut off before its first commit leaves its initial weights, or the files that it expects.
        left = sorted(folder.name for folder in self.path.glob("stage-*"))
        tensors = sorted(file.name for file in self.path.glob(f"{TENSORS}/*.safetensors"))
        left += [f"{TENSORS}/{name}" for name in tensors if name not in {"weights-000.safetensors", *expected}]
        if left:
            raise RunStateError(
                f"`output_dir` {str(self.path)!r} holds {left[0]!r} of another run, but no {STATE_FILE}. Remove what "
                "is left of that run, or choose another folder."
            )

    # --- writing ---------------------------------------------------------------------------------------------------

    def write_tensors(self, state: RunState, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, gathered, under a new name and note it in `state`, which is not yet committed. Collective."""
        name = tensor_file(kind, number)
        state.checksums.pop(name, None)
        whole = whole_tensors(tensors, keep=self._writes)
        if self._writes:
            file = self.path / TENSORS / name
            write_tensors(file, whole)
            state.checksums[name] = checksum(file)
        state.files[kind] = name
        self._seen_whole.discard(name)

    def commit(self, state: RunState) -> None:
        """Make `state` the newest on disk and remove what no kept state names. Collective.

        A state before the same stage is replaced; of earlier ones as many are kept as there should be.
        """
        named = set(state.files.values())
        state.checksums = {name: values for name, values in state.checksums.items() if name in named}
        if self._writes:
            self._states.put(state)
        wait_for_everyone()

    def size(self) -> int:
        """Bytes of all that `clear` removes."""
        own = [*self.path.glob("hbat_state*.json"), *self.path.glob(f"{TENSORS}/*"), *self.path.glob("stage-*/**/*")]
        return sum(file.stat().st_size for file in own if file.is_file())

    def clear(self) -> None:
        """Remove the run, and nothing else. Collective."""
        if self._writes:
            self._states.clear()
            shutil.rmtree(self.path / TENSORS, ignore_errors=True)
        self.remove_stages_but(None)
        wait_for_everyone()

    def remove_stage(self, name: str) -> None:
        """Remove the folder of a stage that is done."""
        if self._writes:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_stages_but(self, index: int | None) -> None:
        """Remove the folders of all stages but one, or of all (None): they are done or will be trained again."""
        for folder in sorted(self.path.glob("stage-*")):
            match = _STAGE.fullmatch(folder.name)
            if match and int(match[1]) != index:
                self.remove_stage(folder.name)
