"""Where rows come from: source, number and columns as their user knows them, for messages about them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from hbat.data.conversion import Conversion
from hbat.data.faults import Fault


@dataclass(frozen=True)
class Part:
    """One source of a data set.

    Attributes:
        name: The file or data set, for messages; empty if there is but one.
        rows: All of its rows as they were found.
        conversion: What made rows of TRL's formats out of them, if anything.
        source: The name of the file, or of the data set on the Hub; empty for rows that were given in memory.
    """

    name: str
    rows: Dataset
    conversion: Conversion | None = None
    source: str = ""


@dataclass(frozen=True)
class Origin:
    """Where every row of a data set comes from.

    Attributes:
        parts: Its sources.
        part: Index of each row's source.
        number: Number of each row in its source, from 0.
    """

    parts: tuple[Part, ...]
    part: Any
    number: Any

    @classmethod
    def of(cls, rows: Dataset, name: str = "", source: str = "") -> "Origin":
        """The origin of all rows of one source."""
        return cls((Part(name, rows, source=source),), np.zeros(len(rows), np.int32), np.arange(len(rows)))

    @classmethod
    def joined(cls, origins: Sequence["Origin"]) -> "Origin":
        """The origin of data sets that are concatenated."""
        parts = tuple(part for origin in origins for part in origin.parts)
        first = np.cumsum([0, *(len(origin.parts) for origin in origins)])
        return cls(
            parts,
            np.concatenate([origin.part + start for origin, start in zip(origins, first, strict=False)]),
            np.concatenate([origin.number for origin in origins]),
        )

    def select(self, indices: Any) -> "Origin":
        """The origin of some of the rows."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, part=self.part[chosen], number=self.number[chosen])

    @property
    def sources(self) -> list[str]:
        """Names of the files and data sets, each once."""
        return list(dict.fromkeys(part.source for part in self.parts if part.source))

    def where(self, index: int) -> str:
        """Name a row, such as `row 7` or `row 7 of pairs.jsonl`."""
        name = self.parts[self.part[index]].name
        return f"row {self.number[index]}{f' of {name}' if name else ''}"

    def worded(self, index: int, fault: Fault) -> Fault:
        """Say a fault of a row in the words of its source."""
        part = self.parts[self.part[index]]
        return fault if part.conversion is None else part.conversion.worded(fault, part.rows[int(self.number[index])])
