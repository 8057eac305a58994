"""How a row reads to the model, and what of it is learned: as its trainer prepares it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hbat.data.formats import kind_of
from hbat.data.template import Limits, row_fit
from hbat.ewc.fisher import IGNORED
from hbat.objectives.track import Track
from hbat.stages.builder import TrainerBuilder


@dataclass(frozen=True)
class ShownRow:
    """The first row of a data set.

    Attributes:
        name: Objective and row.
        pieces: Its text in pieces, each with whether it is learned.
    """

    name: str
    pieces: Sequence[tuple[str, bool]]


def show_rows(tracks: Sequence[Track], builder: TrainerBuilder, tokenizer: Any) -> list[ShownRow]:
    """Show the first training row of every objective of a known format; none for a processor, as `measure_rows`."""
    if hasattr(tokenizer, "tokenizer"):
        return []
    found = ((track, _pieces(track, builder, tokenizer)) for track in tracks)
    return [
        ShownRow(f"{track.name}, {track.origins['train_dataset'].where(0)}", pieces)
        for track, pieces in found
        if pieces
    ]


def _pieces(track: Track, builder: TrainerBuilder, tokenizer: Any) -> list[tuple[str, bool]]:
    objective, rows = track.objective, track.train_dataset.select([0])
    if kind_of(check := objective.row_check()) == "prompts":
        fit = row_fit(check, tokenizer, Limits(vocabulary=0))
        return [] if fit is None else [(fit.prompt(rows[0]), False), ("(the answer that is generated)", True)]
    if not objective.has_fisher:
        return []
    with builder.building(track, train_dataset=rows) as trainer:
        prepared: Any = trainer.train_dataset
        given = prepared.select(range(min(1, len(prepared))))
        # As if a bad answer were a good one, which is what KTO learns sequences of.
        sequences = [list(objective.fisher_sequences({**row, "label": True})) for row in given]
    for sequence in itertools.chain.from_iterable(sequences):
        tokens = zip(sequence.input_ids, sequence.labels, strict=True)
        return [
            (tokenizer.decode([token for token, _ in group]), learned)
            for learned, group in itertools.groupby(tokens, key=lambda pair: pair[1] != IGNORED)
        ]
    return []
