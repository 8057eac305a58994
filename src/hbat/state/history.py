"""Which states of a run stay on disk, newest first, and what is removed with an old one."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from hbat.state.files import write_bytes
from hbat.state.manifest import STATE_FILE, RunState, RunStateError, decode, encode

logger = logging.getLogger(__name__)

TENSORS = "state"
_OLDER = re.compile(r"hbat_state\.previous(?:-(\d+))?\.json")


class _Kept(NamedTuple):
    """A committed state on disk."""

    next_stage: int
    names: frozenset[str]
    manifest: bytes

    @classmethod
    def of(cls, state: RunState, manifest: bytes) -> "_Kept":
        return cls(state.next_stage, frozenset(state.files.values()), manifest)


class KeptStates:
    """The states of a run on disk by age: 0 is the newest, 1 that of the stage before, and so on up to `limit`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._kept: list[_Kept] = []  # newest first, without damaged ones

    def ages(self) -> list[int]:
        """List the ages of the manifests in the folder."""
        newest = [0] if (self._folder / STATE_FILE).exists() else []
        older = (_OLDER.fullmatch(file.name) for file in self._folder.glob("hbat_state.previous*.json"))
        return newest + sorted(int(match[1] or 1) for match in older if match)

    def manifest(self, age: int) -> Path:
        """Path of the manifest of an age."""
        older = "" if age == 0 else ".previous" if age == 1 else f".previous-{age}"
        return self._folder / f"hbat_state{older}.json"

    def resume_from(self, age: int) -> RunState:
        """Read a complete state and take it for the newest: the next commit ages it."""
        state = decode(self.manifest(age))
        self._kept = [_Kept.of(state, self.manifest(age).read_bytes())]
        for older in self.ages():
            if older > age:
                try:
                    self._kept.append(_Kept.of(decode(self.manifest(older)), self.manifest(older).read_bytes()))
                except RunStateError:  # damaged, so its place can be taken
                    continue
        return state

    def put(self, state: RunState) -> None:
        """Commit a state whose tensors are on disk. One before the same stage is replaced, the others age.

        Nothing is removed, and no manifest replaced, before what takes its place is on disk.
        """
        earlier = [kept for kept in self._kept if kept.next_stage != state.next_stage]
        newest_first = [_Kept.of(state, encode(state)), *earlier][: self._limit]
        for age, kept in reversed(list(enumerate(newest_first))):
            file = self.manifest(age)
            if not file.is_file() or file.read_bytes() != kept.manifest:
                write_bytes(file, kept.manifest)
        self._kept = newest_first
        self._clean()

    def clear(self) -> None:
        """Remove all manifests, oldest first: killed in between, the newest one still stands for the run."""
        for age in reversed(self.ages()):
            self.manifest(age).unlink()

    def _clean(self) -> None:
        named = frozenset[str]().union(*(kept.names for kept in self._kept))
        superfluous = [self.manifest(age) for age in self.ages() if age >= len(self._kept)]
        if (self._folder / TENSORS).is_dir():
            superfluous += [file for file in (self._folder / TENSORS).iterdir() if file.name not in named]
        for path in superfluous:
            try:
                if not path.is_dir():
                    path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s is no longer needed, but cannot be removed (%s).", path, error)
