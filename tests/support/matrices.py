"""Forgetting matrices of runs that never happened."""

from hbat.reports.matrix import ForgettingMatrix


def matrix(*rows, headline=None):
    """A matrix from (objective trained, {objective: loss}); None as objective is the start."""
    found = ForgettingMatrix(headline or {"sft": "loss", "dpo": "loss"})
    offset = 1 if rows and rows[0][0] is None else 0
    for number, (objective, losses) in enumerate(rows):
        stage = number - offset
        found.add(
            stage=stage,
            round_number=max(stage, 0) // 2 + 1,
            objective=objective,
            scores={name: {"loss": loss} for name, loss in losses.items()},
        )
    return found


TWO_ROUNDS = [
    (None, {"sft": 4.0, "dpo": 0.7}),
    ("sft", {"sft": 2.0, "dpo": 0.9}),
    ("dpo", {"sft": 2.5, "dpo": 0.4}),
    ("sft", {"sft": 1.0, "dpo": 0.5}),
    ("dpo", {"sft": 1.75, "dpo": 0.25}),
]
