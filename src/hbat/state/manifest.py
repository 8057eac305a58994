"""The manifest of a run: where it stands between two stages, as a JSON file with its own checksum."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_origin

from hbat.config.chain import shares_of
from hbat.state.files import digest
from hbat.state.plan import Stage, plan

STATE_FILE = "hbat_state.json"
FORMAT = 5


class RunStateError(ValueError):
    """The run in the output folder cannot be resumed, or must not be overwritten."""


class DamagedStateError(RunStateError):
    """A file of a run is missing or is not what was written."""


@dataclass
class RunState:
    """Where a run stands between two stages.

    Attributes:
        fingerprint: What the run trains on what: the values of its `Fingerprint`.
        given: Names of these values that the user has set, by section; all others are defaults.
        versions: Versions of the libraries that last wrote the run.
        model: Name of the model that it trains, with its adapter.
        first_stage: Index of the run's first stage: 0, or where the run that it continues ended.
        rounds_before: Number of rounds of the runs that the run continues.
        next_stage: Index of the stage that trains next; that of the last one plus 1 once the run is finished.
        global_step: Optimizer steps so far, over all stages.
        objective_steps: Optimizer steps so far by objective.
        optim: Optimizers of objectives that runs before this one trained, whose moments may still be there.
        files: Names of the tensor files in `state/` by what they hold.
        checksums: Size and checksum of these files by name.
        costs: What stages and evaluations took, in order: `seconds` in all, and of them those of
            `evaluation`, `saving` and `ewc`; `peak_gib`, and of a stage `objective`, `steps`, `tokens` and, if it was
            resumed inside, `resumed_at`: all but `steps` are about what came after it.
        predicted: By how much the last stage raised the loss of each other objective, as its penalty predicts it.
        evaluations: Rows of the forgetting matrix so far.
        log: Number of entries of the log so far, and their checksum.
        rollbacks: How often a stage was rolled back after a NaN, by its index as text.
        changes: Values that changed within the run, with the stage from which on they hold.
    """

    fingerprint: dict[str, Any]
    given: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model: str = ""
    first_stage: int = 0
    rounds_before: int = 0
    next_stage: int = 0
    global_step: int = 0
    objective_steps: dict[str, int] = field(default_factory=dict)
    optim: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, Any] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)
    rollbacks: dict[str, int] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plan(self) -> list[Stage]:
        """The run's stages, without those of the runs that it continues."""
        run = self.fingerprint["run"]
        names, rounds = run["objectives"], run.get("rounds")
        return plan(
            run["num_rounds"],
            names,
            shares=None if rounds is None else shares_of(rounds, names),
            first_stage=self.first_stage,
            rounds_before=self.rounds_before,
        )

    def require_finished(self, where: str) -> None:
        """Raise `RunStateError` if stages of the run are left; `where` names its folder."""
        if (done := self.next_stage - self.first_stage) < (planned := len(self.plan)):
            raise RunStateError(
                f"The run in {where} is not finished: {done} of its {planned} stages are done. Finish it first, with "
                "`resume_from_checkpoint=True` (`hbat train --resume`)."
            )


def encode(state: RunState) -> bytes:
    """Serialize a run's state."""
    values = {"format": FORMAT} | asdict(state)
    return (json.dumps(values | {"checksum": digest(values)}, indent=1) + "\n").encode()


def decode(file: Path) -> RunState:
    """Read a manifest; raises `DamagedStateError` for a damaged one, `RunStateError` for one of another format."""
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
        recorded, expected = values.pop("checksum", None), digest(values)
        found = values.pop("format")
    except FileNotFoundError as error:
        raise DamagedStateError(f"{file} is missing.") from error
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedStateError(f"{file} cannot be read ({error!r}).") from error
    if recorded != expected:
        raise DamagedStateError(f"{file} is not what was written: its checksum differs.")
    if found != FORMAT:
        raise RunStateError(f"{file} has format {found!r}; this version of hbat reads format {FORMAT}.")
    try:
        return _checked(RunState(**values))
    except TypeError as error:
        raise DamagedStateError(f"{file} cannot be read ({error}).") from error


def _checked(state: RunState) -> RunState:
    for item in fields(state):
        value, expected = getattr(state, item.name), get_origin(item.type) or item.type
        if not isinstance(value, cast("type", expected)) or isinstance(value, bool):
            raise TypeError(f"`{item.name}` is {value!r}")
    for name in state.files.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise TypeError(f"`files` names {name!r}, which is no file of `state/`")
    return state
