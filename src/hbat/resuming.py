"""Going on with a run: what may be asked for, and what becomes of a stage under way."""

import logging
from collections.abc import Sequence
from typing import Any

from hbat.changes import Change
from hbat.manifest import RunState
from hbat.rounds import plan
from hbat.run_state import RunFolder

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
