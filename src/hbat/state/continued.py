"""A finished run that another one continues: what it must be, and what of it goes into the new run's folder."""

import logging
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
    """The finished run (`continue_from`) that a new one continues. Nothing in its folder is changed.

    Attributes:
        carried: Kinds of tensors that the new run takes over, each with the number of its file.

    Raises:
        RunStateError: If `continue_from` holds no run, an unfinished or a damaged one, or one that left what does not
            fit the new run's model, tokenizer or `ewc`.
    """

    def __init__(self, config: HBATConfig, described: Fingerprint) -> None:
        self._path, self._described = Path(str(config.continue_from)), described
        self._folder = RunFolder(self._path, writes=is_main_process())
        named = f"`continue_from` {str(self._path)!r}"
        if not self._folder.holds_run():
            raise RunStateError(f"{named} holds no run. Give the `output_dir` of a finished run.")
        try:
            state = self._state = self._folder.read_newest()
        except RunStateError as error:
            raise RunStateError(f"{named} cannot be continued: {error}") from error
        run = state.fingerprint["run"]
        state.require_finished(named)
        if found := hindrances(Fingerprint(state.fingerprint, state.given, state.versions), described):
            raise RunStateError(
                f"{named} holds a run that cannot be continued with other values: {'; '.join(found)}. Restore these "
                "values, or start a run of its own."
            )
        own = {name: values["optim"] for name, values in state.fingerprint.items() if "optim" in (values or {})}
        self._optim = state.optim | own
        self._next_round = state.rounds_before + run["num_rounds"]
        self.carried = {
            kind: state.next_stage - (kind != "weights") for kind in state.files if self._fits(kind, config)
        }
        if config.ewc is not None and _BESIDE_EWC.issuperset(kind.partition("-")[0] for kind in state.files):
            logger.warning("%s left no importance (its `ewc` was off), so it holds nothing back.", named)

    def _fits(self, kind: str, config: HBATConfig) -> bool:
        what, _, objective = kind.partition("-")
        if what == "optimizer":  # another optimizer keeps other moments
            now = self._described.values.get(objective, {}).get("optim")
            return config.optimizer_state == "carry" and now in {None, self._optim.get(objective)}
        return what in _BESIDE_EWC or config.ewc is not None

    def __str__(self) -> str:
        rows = len(self._state.evaluations)
        return (
            f"It continues the run in {self._path} after its round {self._next_round} with {', '.join(self.carried)}, "
            f"and {rows} rows of scores."
        )

    def files(self) -> set[str]:
        """Names of the tensor files that `carry` writes."""
        return {tensor_file(kind, number) for kind, number in self.carried.items()}

    def carry(self, folder: RunFolder) -> RunState:
        """Begin the new run in its folder with what this one left, and commit its start. Collective.

        Returns:
            Its state before the first stage. Rounds and stages are counted on; steps and log begin anew.
        """
        before, now = self._state, self._described
        state = RunState(now.values, given=now.given, versions=now.versions)
        state.first_stage = state.next_stage = before.next_stage
        state.rounds_before, state.optim = self._next_round, self._optim
        state.evaluations = [{"run": self._path.resolve().name} | row for row in before.evaluations]
        for kind, number in self.carried.items():
            folder.write_tensors(state, kind, number, self._folder.read_tensors(before, kind))
        folder.commit(state)
        return state
