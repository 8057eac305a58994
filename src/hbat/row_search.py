"""Going through the rows of a data set for faults, those that only two rows together show among them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hbat.row_parts import Fault, RowCheck
from hbat.rows import preference_faults


@dataclass
class FaultyRows:
    """The faulty rows of a data set.

    Attributes:
        first: The first fault in words, with its row and field.
        rows: Numbers of the faulty rows.
        kinds: How many rows show each kind of fault; a row can show several.
    """

    first: str = ""
    rows: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, row: int, faults: list[Fault]) -> None:
        """Count a row.

        Args:
            row: Its number.
            faults: What is wrong with it.
        """
        if not self.rows:
            stop = "" if faults[0].problem.endswith("?") else "."
            self.first = f"row {row}, field `{faults[0].field}`: {faults[0].problem}{stop}"
        self.rows.append(row)
        self.kinds.update({fault.kind for fault in faults})

    @property
    def counts(self) -> str:
        """The kinds of faults with their numbers of rows, most frequent first."""
        return ", ".join(
            f"{kind}: {count}" for kind, count in sorted(self.kinds.items(), key=lambda it: (-it[1], it[0]))
        )


def search(rows: Any, faults: RowCheck) -> FaultyRows:
    """Check every row of a data set.

    Args:
        rows: A `datasets.Dataset`, or anything with its `iter`.
        faults: The check of one row. With `preference_faults`, a pair that reverses an earlier one is a fault, too.

    Returns:
        The faulty rows.
    """
    found = FaultyRows()
    reversals = _Reversals() if getattr(faults, "func", faults) is preference_faults else None
    number = 0
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            here = list(faults(row))
            if reversals and not here:  # a row that is faulty in itself contradicts nothing
                here = list(reversals.faults(number, row))
            if here:
                found.add(number, here)
            number += 1
    return found


class _Reversals:
    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], int] = {}

    def faults(self, number: int, row: Mapping[str, Any]) -> Iterator[Fault]:
        chosen, rejected = (_digest(row.get("prompt"), row[side]) for side in ("chosen", "rejected"))
        other = self._seen.get((rejected, chosen))
        if other is not None:
            yield Fault("reversed pair", "chosen", f"row {other} has the same pair with chosen and rejected swapped")
        self._seen.setdefault((chosen, rejected), number)


def _digest(*values: Any) -> int:
    text = repr(values).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
