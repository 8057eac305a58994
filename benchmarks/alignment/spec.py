"""What a run of the evidence is made of. Imports neither torch nor a trainer."""

from dataclasses import dataclass, field
from typing import Any

from task import TASKS, Conflict

_ALL = tuple(TASKS)


@dataclass(frozen=True)
class Regime:
    """Which data arrives when.

    Attributes:
        conflict: How far the objectives pull apart.
        parts: Tasks of the data that arrives together; every part is a run that continues the one before.
        paired: Tasks that have preference pairs.
        groups: Tasks that are measured together, by name.
    """

    conflict: Conflict = field(default_factory=Conflict)
    parts: tuple[tuple[str, ...], ...] = (_ALL,)
    paired: tuple[str, ...] = _ALL
    groups: tuple[tuple[str, tuple[str, ...]], ...] = (("all", _ALL),)


def _halves(first: str, second: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("all", _ALL), (first, _ALL[:4]), (second, _ALL[4:]))


REGIMES = {
    "main": Regime(),
    "half": Regime(paired=_ALL[:4], groups=_halves("with pairs", "without pairs")),
    "weak": Regime(Conflict(politeness=0.8)),
    "strong": Regime(Conflict(politeness=0.3, brevity=0.8)),
    "time2": Regime(parts=(_ALL[:4], _ALL[4:]), groups=_halves("old", "new")),
    "time4": Regime(parts=tuple(_ALL[i : i + 2] for i in range(0, 8, 2)), groups=_halves("older", "newer")),
}


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        method: Its name in the tables.
        family: Methods between which a user would choose by trying.
        options: Fields of `HBATConfig`.
        rate: Learning rate of the preference stages.
        preference: The objective that trains them; `dpo`, `ppo`, or empty for none.
        section: Fields of the preference objective's section, beside the usual ones.
        mixed: Options of a rival without stages (`mixed.py`), which takes the place of `HBATTrainer`.
        old_rows: Share of every later part's rows that are of earlier parts.
        temperatures: Temperatures of sampling.
        score_every: Optimizer steps between scores on the way; 0 for none.
    """

    method: str
    family: str
    regime: str
    base: str
    seed: int
    options: dict[str, Any]
    rate: float = 6e-4
    preference: str = "dpo"
    section: dict[str, Any] = field(default_factory=dict)
    mixed: dict[str, Any] = field(default_factory=dict)
    old_rows: float = 0.0
    temperatures: tuple[float, ...] = (0.0, 0.75, 1.0)
    score_every: int = 0

    @property
    def key(self) -> str:
        """What tells runs apart."""
        return "/".join((self.regime, self.base, self.method, str(self.seed)))
