"""A finished run that another one continues: what it must be, and what of it goes into the new run's folder."""

import logging
from collections.abc import Iterator
from pathlib import Path

from hbat.config.hbat import HBATConfig
from hbat.engines.processes import is_main_process
from hbat.state.changes import hindrances
from hbat.state.fingerprint import Fingerprint
from hbat.state.folder import RunFolder, tensor_file
from hbat.state.manifest import RunState, RunStateError

logger = logging.getLogger(__name__)

#: Kinds of tensors that are not importance, and so have nothing to do with `ewc`.
_BESIDE_EWC = {"weights", "initial", "kept", "optimizer"}


class FinishedRun:
    """A finished run, of which nothing is changed.

    Args:
        path: Its folder.

    Raises:
        RunStateError: If the folder holds no run, an unfinished or a damaged one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = RunFolder(path, writes=is_main_process())
        if not self._folder.holds_run():
            raise RunStateError(f"`continue_from` {path!r} holds no run. Give the `output_dir` of a finished run.")
        try:
            self.state = self._folder.read_newest()
        except RunStateError as error:
            raise RunStateError(f"`continue_from` {path!r} cannot be continued: {error}") from error
        run, done = self.state.fingerprint["run"], self.state.next_stage - self.state.first_stage
        if done < (planned := run["num_rounds"] * len(run["objectives"])):
            raise RunStateError(
                f"The run in `continue_from` {path!r} is not finished: {done} of its {planned} stages are done. "
                "Resume it first (`resume_from_checkpoint=True`, `--resume`)."
            )
        self._next_round = self.state.first_round + run["num_rounds"]

    def __str__(self) -> str:
        state = self.state
        return (
            f"Continues the run in {self.path}, which ended with round {self._next_round} (stage "
            f"{state.next_stage - 1}): {', '.join(sorted(state.files))}; {len(state.evaluations)} rows of scores."
        )

    def require_same(self, described: Fingerprint) -> None:
        """Raise `RunStateError` if what this run left does not fit another run's model, tokenizer or `ewc`."""
        state = self.state
        if found := hindrances(Fingerprint(state.fingerprint, state.given, state.versions), described):
            raise RunStateError(
                f"The run in `continue_from` {self.path!r} cannot be continued like this: {'; '.join(found)}. Restore "
                "these values, or start a run of its own."
            )

    def files(self, config: HBATConfig, described: Fingerprint) -> set[str]:
        """Names of the files that `carry` writes."""
        return {tensor_file(kind, number) for kind, number in self._carried(config, described)}

    def carry(self, config: HBATConfig, described: Fingerprint, folder: RunFolder) -> RunState:
        """Begin another run in its folder with what this one left, and commit its start. Collective.

        Args:
            config: Configuration of the other run.
            described: Its fingerprint.
            folder: Its folder.

        Returns:
            Its state before the first stage. Rounds and stages are counted on; steps and log begin anew.

        Raises:
            RunStateError: If what this run left does not fit.
        """
        self.require_same(described)
        before, name = self.state, Path(self.path).resolve().name
        state = RunState(described.values, given=described.given, versions=described.versions)
        state.first_stage = state.next_stage = before.next_stage
        state.first_round = self._next_round
        state.evaluations = [{"run": name} | row for row in before.evaluations]
        for kind, number in self._carried(config, described):
            folder.write_tensors(state, kind, number, self._folder.read_tensors(before, kind))
        folder.commit(state)
        if config.ewc is not None and all(kind.partition("-")[0] in _BESIDE_EWC for kind in state.files):
            logger.warning(
                "The run in %s left no importance (`ewc: null`, or a strength of 0), so what it learned holds nothing "
                "back.",
                self.path,
            )
        return state

    def _carried(self, config: HBATConfig, described: Fingerprint) -> Iterator[tuple[str, int]]:
        for kind in self.state.files:
            what, _, objective = kind.partition("-")
            fits = what in _BESIDE_EWC or config.ewc is not None
            if what == "optimizer":
                before, now = self.state.fingerprint[objective], described.values.get(objective, {})
                # Another optimizer keeps other moments.
                fits = config.optimizer_state == "carry" and now.get("optim", before["optim"]) == before["optim"]
            if fits:
                yield kind, self.state.next_stage - (kind != "weights")
