"""The last stage of a finished run on disk: the line through the weights at its start and at its end."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbat.engines.sharded import shared_as
from hbat.state.changes import changes
from hbat.state.fingerprint import Fingerprint
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunState, RunStateError
from hbat.state.plan import Stage

#: Without these in common, the weights on disk are not those of this model, or are scored otherwise.
_SHARED = ("run.objectives", "run.num_rounds", "run.rounds", "parameters.", "tokenizer.")


@dataclass(frozen=True)
class LastStage:
    """Weights at the start and at the end of a finished run's last stage.

    Attributes:
        stage: The stage.
        state: The run's state at its end.
        start: Trainable weights by name at the start, on the CPU.
        end: Those that the run ended with.
        end_weight: Weight of the stage's own end in these; 1.0 where the two are the same.
    """

    stage: Stage
    state: RunState
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    end_weight: float

    @classmethod
    def read(cls, folder: RunFolder, described: Fingerprint) -> "LastStage":
        """Read it from the folder of the run with this fingerprint, which is left as it is.

        Raises:
            RunStateError: If the folder holds no run, another one, or one that is not finished; if it kept nothing of
                its last stage (`end_weight: 0`); or if the start of that is no longer on disk.
        """
        where, states = f"`output_dir` {str(folder.path)!r}", folder.states()
        state = next(states, None)
        if state is None:
            raise RunStateError(f"{where} holds no run. Train it first.")
        differing = changes(state.fingerprint, described.values)
        if found := [str(change) for change in differing if change.name.startswith(_SHARED)]:
            raise RunStateError(f"{where} holds another run: {'; '.join(found)}. Give the values that it had.")
        state.require_finished(where)
        stage = state.plan[-1]
        before = next((earlier for earlier in states if earlier.next_stage == stage.index), None)
        if before is None:
            raise RunStateError(
                f"The start of the last stage is no longer in {where}, which keeps the run's last state alone "
                "(`keep_states: 1`). Train with `keep_states: 2` or more."
            )
        # Not the state after the stage: a finished run may be resumed with another value, which changes nothing.
        end_weight = float(before.fingerprint["run"]["end_weight"])
        if end_weight == 0:
            raise RunStateError(
                f"The run in {where} has kept nothing of its last stage: it was trained with `end_weight: 0`. Train "
                "with a larger one; 1.0 keeps all."
            )
        start, end = (folder.read_tensors(of, "weights") for of in (before, state))
        return cls(stage, state, start, end, end_weight)

    @torch.no_grad()
    def move(self, parameters: Mapping[str, Tensor], end_weight: float) -> None:
        """Set a model's parameters to `start + end_weight * (end - start)`, with the stage's end before averaging."""
        for name, parameter in parameters.items():
            # Bit for bit the start at 0 and the run's end at its own `end_weight`.
            point = torch.lerp(self.start[name].float(), self.end[name].float(), end_weight / self.end_weight)
            parameter.copy_(shared_as(point, parameter))
