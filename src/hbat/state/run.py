"""A run between its stages: what goes to disk when a stage is done, and comes back when the run goes on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbat.config.hbat import HBATConfig
from hbat.engines.processes import wait_for_everyone
from hbat.engines.sharded import shared_as
from hbat.ewc.parameters import require_counterparts
from hbat.state.consolidation import Consolidation
from hbat.state.fingerprint import Change, accepted
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunState, RunStateError
from hbat.state.plan import Stage, plan

logger = logging.getLogger(__name__)


def check_request(resume_from_checkpoint: object, allow_changed: Sequence[str], output_dir: str) -> None:
    """Check with which arguments a run is asked to start or go on.

    Args:
        resume_from_checkpoint: Whether to go on.
        allow_changed: Names of what may differ.
        output_dir: The run's folder, for messages.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If they contradict each other.
    """
    if resume_from_checkpoint not in {None, True, False}:
        raise TypeError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}; a run goes on in its own `output_dir` "
            f"({output_dir!r}), so it must be True, False or None."
        )
    if isinstance(allow_changed, str):
        raise TypeError(f"`allow_changed` is {allow_changed!r}; give a list of names.")
    if allow_changed and not resume_from_checkpoint:
        raise ValueError("`allow_changed` is about a run that goes on; it needs `resume_from_checkpoint=True`.")


def take_over(
    folder: RunFolder, state: RunState, described: dict[str, Any], changed: Sequence[Change], *, num_rounds: int,
    objectives: Sequence[str],
) -> None:  # fmt: skip
    """Leave of the stages' checkpoints only those that the run goes on from, and write down what changed.

    Args:
        folder: The run's folder.
        state: The state that the run goes on from.
        described: The present fingerprint.
        changed: What changed and was allowed to.
        num_rounds: Number of rounds.
        objectives: Names of the objectives of a round, in order.
    """
    stages = plan(num_rounds, objectives)[state.next_stage :]
    # One stage is trained in one way from its start to its end.
    starts_anew = bool(stages) and any(each.concerns(stages[0].objective, objectives) for each in changed)
    folder.remove_stages_but(None if starts_anew else state.next_stage)
    if changed:
        lines = [str(each) for each in changed]
        logger.info("From stage %d on the run goes on with: %s.", state.next_stage, "; ".join(lines))
        state.fingerprint = described
        state.changes.append({"stage": state.next_stage, "changes": lines})
        folder.commit(state)


class Run:
    """State of a run: its manifest, accumulated importance, and what objectives carry from stage to stage.

    Args:
        config: The run's configuration.
        folder: Its folder.
        state: Its manifest.
    """

    def __init__(self, config: HBATConfig, folder: RunFolder, state: RunState) -> None:
        self.state = state
        # With a single objective nothing would ever read what it accumulates.
        holds_back = config.ewc is not None and len(config.objectives) > 1
        self.consolidation = Consolidation(config.ewc, config.seed) if holds_back else None
        self.moments: dict[str, Mapping[str, Tensor]] = {}
        self.kept: dict[str, Mapping[str, Tensor]] = {}
        self.was_resumed = False
        self._folder = folder

    @classmethod
    def start(
        cls, config: HBATConfig, folder: RunFolder, described: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> "Run":
        """Begin a new run and put its start on disk.

        Args:
            config: The run's configuration.
            folder: Its folder, without a run.
            described: Fingerprint of the run.
            weights: Trainable weights by name.

        Returns:
            The run before its first stage.
        """
        run = cls(config, folder, RunState(fingerprint=described))
        folder.write_tensors(run.state, "weights", 0, weights)
        run.state.files["initial"] = run.state.files["weights"]
        folder.commit(run.state)
        return run

    @classmethod
    def resume(
        cls,
        config: HBATConfig,
        folder: RunFolder,
        state: RunState,
        described: dict[str, Any],
        parameters: Mapping[str, Tensor],
        *,
        allow_changed: Sequence[str] = (),
        needs_initial: bool = False,
    ) -> "Run":
        """Read a run that goes on.

        Args:
            config: The present configuration.
            folder: The run's folder.
            state: Its manifest.
            described: Fingerprint of the present configuration and data.
            parameters: The model's trainable parameters by name.
            allow_changed: What of it may differ from the run on disk.
            needs_initial: Whether the weights of the run's start will be asked for.

        Returns:
            The run before its next stage.

        Raises:
            RunStateError: If configuration or data are not those of the run on disk, or a file is damaged.
        """
        changed = accepted(state.fingerprint, described, allow_changed, output_dir=config.output_dir)
        run = cls(config, folder, state)
        for objective in config.objective_names:
            importance = folder.read_tensors(state, f"importance-{objective}")
            if importance and run.consolidation is not None:
                own = {name: shared_as(each, parameters[name]).cpu() for name, each in importance.items()}
                run.consolidation.accumulated[objective] = own
            run.read_carried(objective)
        if needs_initial:
            folder.require_whole(state, "initial")
        names = config.objective_names
        take_over(folder, state, described, changed, num_rounds=config.num_rounds, objectives=names)
        run.was_resumed = True
        return run

    def read_carried(self, objective: str) -> None:
        """Read what an objective carries to its next stage.

        Args:
            objective: Its name.
        """
        self.moments[objective] = self._folder.read_tensors(self.state, f"optimizer-{objective}")
        self.kept[objective] = self._folder.read_tensors(self.state, f"kept-{objective}")

    def rollbacks(self, stage: Stage) -> int:
        """Count how often a stage was rolled back.

        Args:
            stage: The stage.

        Returns:
            The number.
        """
        return self.state.rollbacks.get(str(stage.index), 0)

    def roll_back(self, stage: Stage, parameters: Mapping[str, Tensor]) -> None:
        """Go back to a stage's start, as it lies on disk, and count it.

        Args:
            stage: The stage under way.
            parameters: The model's trainable parameters by name.
        """
        self.state.rollbacks[str(stage.index)] = self.rollbacks(stage) + 1
        self._folder.commit(self.state)
        self.load_weights(parameters)
        self.read_carried(stage.objective)

    @classmethod
    def open(
        cls,
        config: HBATConfig,
        folder: RunFolder,
        described: dict[str, Any],
        weights: Mapping[str, Tensor],
        *,
        resume: bool,
        allow_changed: Sequence[str] = (),
        needs_initial: bool = False,
    ) -> "Run":
        """Begin a run, or go on with the one in the folder.

        Args:
            config: The run's configuration.
            folder: Its folder.
            described: Fingerprint of the run.
            weights: Trainable weights by name, with which a new run begins.
            resume: Whether the run in the folder goes on.
            allow_changed: What of the fingerprint may differ from the run in the folder.
            needs_initial: Whether the weights of the run's start will be asked for.

        Returns:
            The run before its next stage; whether it went on says `was_resumed`.

        Raises:
            RunStateError: If the folder holds a run that may not or cannot go on.
        """
        if not resume and folder.holds_run():
            raise RunStateError(
                f"`output_dir` {config.output_dir!r} holds a run already. Pass `resume_from_checkpoint=True` to go on "
                "with it, or choose another folder."
            )
        found = folder.read()
        if found is None:
            folder.require_unused()
        wait_for_everyone()  # before a process makes the folder a run's
        if found is None:
            return cls.start(config, folder, described, weights)
        return cls.resume(
            config, folder, found, described, weights, allow_changed=allow_changed, needs_initial=needs_initial
        )

    def weights(self, kind: str = "weights") -> dict[str, Tensor]:
        """Read trainable weights.

        Args:
            kind: `weights` of the next stage's start, or `initial` ones of the run.

        Returns:
            Weights by name.
        """
        return self._folder.read_tensors(self.state, kind)

    @torch.no_grad()
    def load_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Give a model the weights of the next stage's start.

        Args:
            parameters: Its trainable parameters by name.

        Raises:
            ValueError: If a weight is missing on disk or has another shape.
        """
        weights = self.weights()
        require_counterparts(parameters, weights, "weight on disk")
        for name, each in parameters.items():
            each.copy_(shared_as(weights[name], each))

    def commit_stage(
        self,
        stage: Stage,
        *,
        steps: int,
        importance: Mapping[str, Tensor] | None,
        moments: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take in what a stage left, and make it the run's state on disk.

        Args:
            stage: The stage that is done.
            steps: Its optimizer steps.
            importance: Raw importance that it yields.
            moments: Moments for its objective's next stage.
            weights: Trainable weights at its end.
            kept: What its objective keeps for its next stage beside the model.
        """
        state, name = self.state, stage.objective
        if self.consolidation is not None and importance is not None:
            self.consolidation.add(name, importance)
            accumulated = self.consolidation.accumulated[name]
            self._folder.write_tensors(state, f"importance-{name}", stage.index, accumulated)
        self.moments[name] = moments
        if moments:
            self._folder.write_tensors(state, f"optimizer-{name}", stage.index, moments)
        self.kept[name] = kept or {}
        if kept:
            self._folder.write_tensors(state, f"kept-{name}", stage.index, kept)
        self._folder.write_tensors(state, "weights", stage.index + 1, weights)
        state.next_stage = stage.index + 1
        state.global_step += steps
        state.objective_steps[name] = state.objective_steps.get(name, 0) + steps
        self._folder.commit(state)
        self._folder.remove_stage(stage.folder)

    def commit_evaluations(self, rows: list[dict[str, Any]]) -> None:
        """Put the rows of the forgetting matrix on disk.

        Args:
            rows: All rows so far.
        """
        self.state.evaluations = rows
        self._folder.commit(self.state)
