"""Which states of a run are kept on disk, newest first, and what is removed with one that is not."""

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
    """A state that is on disk, as it was committed."""

    next_stage: int
    names: frozenset[str]
    manifest: bytes


class KeptStates:
    """The states of a run on disk, by age: 0 is the newest, 1 the one of the stage before.

    Args:
        folder: The run's folder.
        limit: How many are kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._kept: list[_Kept] = []  # newest first, without those that are damaged

    def ages(self) -> list[int]:
        """List the manifests in the folder.

        Returns:
            Their ages; none in a folder without a run.
        """
        newest = [0] if (self._folder / STATE_FILE).exists() else []
        older = (_OLDER.fullmatch(each.name) for each in self._folder.glob("hbat_state.previous*.json"))
        return newest + sorted(int(each[1] or 1) for each in older if each)

    def manifest(self, age: int) -> Path:
        """Name the manifest of an age.

        Args:
            age: 0 for the newest.

        Returns:
            Its file.
        """
        older = "" if age == 0 else ".previous" if age == 1 else f".previous-{age}"
        return self._folder / f"hbat_state{older}.json"

    def go_on_from(self, age: int) -> RunState:
        """Read a state that is complete. It counts as the newest, so that the next one takes no older one's place.

        Args:
            age: Its age.

        Returns:
            The state.
        """
        state = decode(self.manifest(age))
        self._kept = [_kept(state, self.manifest(age).read_bytes())]
        for older in self.ages():
            if older > age:
                try:
                    self._kept.append(_kept(decode(self.manifest(older)), self.manifest(older).read_bytes()))
                except RunStateError:  # of no use, so that its place can be taken
                    continue
        return state

    def put(self, state: RunState) -> None:
        """Make a state the newest. One before the same stage is replaced, the others age.

        Nothing is removed, and no manifest replaced, before what takes its place is on disk.

        Args:
            state: The state; its tensors are on disk.
        """
        earlier = [each for each in self._kept if each.next_stage != state.next_stage]
        kept = [_kept(state, encode(state)), *earlier][: self._limit]
        for age in reversed(range(len(kept))):
            file = self.manifest(age)
            if not file.is_file() or file.read_bytes() != kept[age].manifest:
                write_bytes(file, kept[age].manifest)
        self._kept = kept
        self._clean()

    def _clean(self) -> None:
        named = frozenset[str]().union(*(each.names for each in self._kept))
        superfluous = [self.manifest(age) for age in self.ages() if age >= len(self._kept)]
        if (self._folder / TENSORS).is_dir():
            superfluous += [each for each in (self._folder / TENSORS).iterdir() if each.name not in named]
        for each in superfluous:
            try:
                if not each.is_dir():
                    each.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s is no longer needed, but cannot be removed (%s).", each, error)


def _kept(state: RunState, manifest: bytes) -> _Kept:
    return _Kept(state.next_stage, frozenset(state.files.values()), manifest)
