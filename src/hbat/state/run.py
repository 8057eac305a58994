"""A run between its stages: what is committed to disk when a stage is done, and read back on resume."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbat.config.hbat import HBATConfig
from hbat.engines.processes import wait_for_everyone
from hbat.engines.sharded import shared_as
from hbat.ewc.parameters import require_counterparts
from hbat.state.changes import Change, accepted
from hbat.state.clock import Clock, peak_memory
from hbat.state.consolidation import DISPLACEMENT, KINDS, Consolidation, Record
from hbat.state.continued import FinishedRun
from hbat.state.fingerprint import Fingerprint
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunState, RunStateError
from hbat.state.plan import Stage

logger = logging.getLogger(__name__)


def check_request(resume_from_checkpoint: object, allow_changed: Sequence[str], output_dir: str) -> None:
    """Check the arguments of `train`; raises `TypeError` or `ValueError`."""
    if resume_from_checkpoint not in {None, True, False}:
        raise TypeError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}; a run is resumed in its own `output_dir` "
            f"({output_dir!r}), so it must be True, False or None."
        )
    if isinstance(allow_changed, str):
        raise TypeError(f"`allow_changed` is {allow_changed!r}; give a list of names.")
    if allow_changed and not resume_from_checkpoint:
        raise ValueError("`allow_changed` is about a run that is resumed; it needs `resume_from_checkpoint=True`.")


class Run:
    """State of a run: its manifest, accumulated importance, and what objectives carry from stage to stage."""

    def __init__(self, config: HBATConfig, folder: RunFolder, state: RunState) -> None:
        self.state = state
        self.plan = state.plan
        # With a single objective as well: a run that continues this one may train another.
        self.consolidation = Consolidation(config.ewc, config.seed) if config.ewc is not None else None
        self.moments: dict[str, Mapping[str, Tensor]] = {}
        self.kept: dict[str, Mapping[str, Tensor]] = {}
        self.was_resumed = False
        self.clock = Clock()
        self._config = config
        self._folder = folder

    # --- begin or resume -------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        config: HBATConfig,
        folder: RunFolder,
        described: Fingerprint,
        weights: Mapping[str, Tensor],
        *,
        resume: bool,
        allow_changed: Sequence[str] = (),
        needs_initial: bool = False,
        continued: FinishedRun | None = None,
    ) -> "Run":
        """Begin a run with the model's trainable `weights`, or resume the one in the folder. Collective.

        What of the fingerprint `described` may differ from the run in the folder is in `allow_changed`;
        `needs_initial` says whether the initial weights of the run will be needed. A new run continues `continued`, by
        default what it reads from `continue_from`.

        Returns:
            The run before its next stage; `was_resumed` says whether its weights are on disk, not the model's.

        Raises:
            RunStateError: If the folder holds a run that may not or cannot be resumed.
        """
        if not resume and config.overwrite_output_dir:
            folder.clear()
        elif not resume and folder.holds_run():
            raise RunStateError(
                f"`output_dir` {config.output_dir!r} holds a run already. Pass `resume_from_checkpoint=True` to "
                "resume it, set `overwrite_output_dir=True` to start over, or choose another folder."
            )
        found = folder.read()
        if found is None and config.continue_from is not None:
            continued = continued or FinishedRun(config, described)
        if found is None:
            folder.require_unused(continued.files() if continued is not None else ())
        wait_for_everyone()  # before a process makes the folder a run's
        if found is None and continued is not None:
            found = continued.carry(folder)
        if found is None:
            state = RunState(described.values, given=described.given, versions=described.versions)
            folder.write_tensors(state, "weights", 0, weights)
            state.files["initial"] = state.files["weights"]
            folder.commit(state)
            return cls(config, folder, state)
        before = Fingerprint(found.fingerprint, found.given, found.versions)
        changed = accepted(before, described, allow_changed, output_dir=config.output_dir)
        run = cls(config, folder, found)
        run.was_resumed = True
        run._read(weights)
        if needs_initial:
            folder.require_whole(found, "initial")
        run._take_over(described, changed)
        return run

    def _read(self, parameters: Mapping[str, Tensor]) -> None:
        # Also of objectives that only a run before this one trained, and in the order in which they came.
        for name in self.state.files:
            kind, _, objective = name.partition("-")
            if kind in KINDS and self.consolidation is not None:
                found = self._folder.read_tensors(self.state, name).items()
                own = {name: shared_as(tensor, parameters[name]).cpu() for name, tensor in found}
                self.consolidation.accumulated.setdefault(objective, {})[kind] = own
        self._warn_of_missing_importance()
        for objective in self._config.objective_names:
            self.read_carried(objective)

    def _warn_of_missing_importance(self) -> None:
        if self.consolidation is None or self.consolidation.config.strength == 0:
            return
        if missing := [name for name in self.state.objective_steps if name not in self.consolidation.accumulated]:
            logger.warning(
                "The finished stages of %s have left no importance, as `ewc.strength` was 0: they hold nothing back.",
                missing,
            )

    def _take_over(self, described: Fingerprint, changed: Sequence[Change]) -> None:
        state, objectives = self.state, self._config.objective_names
        stages = self.stages_left()
        # A stage is trained in one way from its start to its end.
        starts_anew = bool(stages) and any(change.concerns(stages[0].objective, objectives) for change in changed)
        self._folder.remove_stages_but(None if starts_anew else state.next_stage)
        state.fingerprint, state.given, state.versions = described.values, described.given, described.versions
        if changed:
            lines = [str(change) for change in changed]
            logger.info("The run is resumed from stage %d with: %s.", state.next_stage, "; ".join(lines))
            state.changes.append({"stage": state.next_stage, "changes": lines})
            self._folder.commit(state)

    def stages_left(self) -> list[Stage]:
        """List the stages that are not done yet."""
        return [stage for stage in self.plan if stage.index >= self.state.next_stage]

    def place(self) -> dict[str, Any]:
        """Where the run is: `stage`, `round` and `objective` of the last stage that is done; None at the start."""
        done = self.state.next_stage - 1
        for stage in self.plan:
            if stage.index == done:
                return {"stage": done, "round": stage.round, "objective": stage.objective}
        return {"stage": done, "round": self.plan[0].round, "objective": None}

    # --- at the start of a stage -----------------------------------------------------------------------------------

    def read_carried(self, objective: str) -> None:
        """Read from disk what an objective carries to its next stage."""
        self.moments[objective] = self._folder.read_tensors(self.state, f"optimizer-{objective}")
        self.kept[objective] = self._folder.read_tensors(self.state, f"kept-{objective}")

    def weights(self, kind: str = "weights") -> dict[str, Tensor]:
        """Read trainable weights by name: `weights` of the next stage's start, or `initial` ones of the run."""
        return self._folder.read_tensors(self.state, kind)

    @torch.no_grad()
    def load_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the weights of the next stage's start into a model's trainable parameters."""
        weights = self.weights()
        require_counterparts(parameters, weights, "weight on disk")
        for name, parameter in parameters.items():
            parameter.copy_(shared_as(weights[name], parameter))

    def rollbacks(self, stage: Stage) -> int:
        """How often a stage was rolled back."""
        return self.state.rollbacks.get(str(stage.index), 0)

    def roll_back(self, stage: Stage, parameters: Mapping[str, Tensor]) -> None:
        """Return a model's parameters to a stage's start, as it is on disk, and count it."""
        self.state.rollbacks[str(stage.index)] = self.rollbacks(stage) + 1
        self._folder.commit(self.state)
        self.load_weights(parameters)
        self.read_carried(stage.objective)

    # --- at its end ------------------------------------------------------------------------------------------------

    def commit_stage(
        self,
        stage: Stage,
        *,
        steps: int,
        importance: Record | None,
        moments: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None = None,
        counted: Mapping[str, float] | None = None,
    ) -> None:
        """Commit what a stage left, and with it the state of the run, to disk.

        `importance` joins that of the stage's objective; `moments` and what else is `kept` are for its next stage;
        `counted` joins the row of costs.
        """
        state, name = self.state, stage.objective
        written: dict[str, Mapping[str, Tensor]] = {f"optimizer-{name}": moments, f"kept-{name}": kept or {}}
        state.predicted = {}
        if self.consolidation is not None and importance is not None:
            state.predicted = self.consolidation.predicted(stage, importance[DISPLACEMENT], weights)
            self.consolidation.add(name, importance)
            written |= {f"{kind}-{name}": sums for kind, sums in self.consolidation.accumulated[name].items()}
        self.moments[name], self.kept[name] = moments, kept or {}
        with self.clock.timing("saving"):
            for kind, tensors in written.items():
                if tensors:
                    self._folder.write_tensors(state, kind, stage.index, tensors)
            self._folder.write_tensors(state, "weights", stage.index + 1, weights)
        state.next_stage = stage.index + 1
        state.global_step += steps
        state.objective_steps[name] = state.objective_steps.get(name, 0) + steps
        self._count(stage.index, objective=name, steps=steps, **(counted or {}))
        self._folder.commit(state)
        self._folder.remove_stage(stage.folder)

    def commit_evaluations(self, rows: list[dict[str, Any]]) -> None:
        """Commit all rows of the forgetting matrix so far."""
        self.state.evaluations = rows
        self._count(self.state.next_stage - 1)
        self._folder.commit(self.state)

    def _count(self, stage: int, **counted: Any) -> None:
        lap = {name: round(seconds, 3) for name, seconds in self.clock.lap().items()}
        self.state.costs.append({"stage": stage, **counted, **lap, "peak_gib": round(peak_memory(), 2)})
