"""The chain of a run: the objectives of a round, and how much of its data each trains on in which round."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hbat.config.fields import check_number, nearest, shown

#: Sections of a run's fingerprint, beside which each objective has its own.
_TAKEN = {"run", "ewc", "data", "parameters", "tokenizer"}


def named(objectives: Any) -> list[Any]:
    """Check the entries of `objectives`, and name a name that is repeated `sft_2`, `sft_3` and so on.

    Returns:
        The entries: names, mappings with `name` and `trainer`, or objects with a `name`.

    Raises:
        ValueError: If there are none, a mapping lacks a key, or two have one name.
    """
    if not isinstance(objectives, list | tuple) or not objectives:
        raise ValueError(f"`objectives` is {shown(objectives)}; it must be a list such as ['sft', 'dpo'].")
    times: Counter[str] = Counter()
    entries: list[Any] = []
    for entry in objectives:
        if isinstance(entry, Mapping) and not (isinstance(entry.get("name"), str) and entry.get("trainer")):
            raise ValueError(
                f"`objectives` holds {shown(entry)}; a mapping needs a `name` and a `trainer`, such as "
                "{'name': 'code', 'trainer': 'trl.SFTTrainer'}."
            )
        times.update([entry] if isinstance(entry, str) else [])
        is_repeated = isinstance(entry, str) and times[entry] > 1
        entries.append({"name": f"{entry}_{times[entry]}", "trainer": entry} if is_repeated else entry)
    names = [name_of(entry) for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"`objectives` is {names}; give every objective a name of its own.")
    if taken := _TAKEN & set(names):
        raise ValueError(f"`objectives` has the name {min(taken)!r}, which the run's state has for itself. Rename it.")
    return entries


def name_of(entry: Any) -> str:
    """Name of an entry of `objectives`."""
    if isinstance(entry, Mapping):
        return str(entry["name"])
    return entry if isinstance(entry, str) else str(getattr(entry, "name", entry))


def require_rounds(rounds: Any, num_rounds: int, names: Sequence[str]) -> None:
    """Check the shares of the data that the objectives train on in each round.

    Raises:
        TypeError: If they are no list of mappings.
        ValueError: If an objective is unknown, a share is none, or shares do not add up.
    """
    if not isinstance(rounds, list | tuple) or not all(isinstance(shares, Mapping) for shares in rounds):
        example = "[{'sft': 0.8, 'dpo': 0.2}, {'sft': 0.2, 'dpo': 0.8}]"
        raise TypeError(f"`rounds` is {shown(rounds)}; it must be a list of mappings such as {example}.")
    if not rounds or num_rounds not in {1, len(rounds)}:
        raise ValueError(
            f"`rounds` lists {len(rounds)} rounds, but `num_rounds` is {num_rounds}. Remove `num_rounds`."
        )
    for number, shares in enumerate(rounds):
        _require_shares(f"rounds[{number}]", shares, names)
    for name, parts in shares_of(rounds, names).items():
        if not 0 < (total := math.fsum(parts)) <= 1 + 1e-9:
            raise ValueError(
                f"`rounds` gives {name!r} a share of {total:g} of its data in all; it must be above 0 and at most 1."
            )


def _require_shares(label: str, shares: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, share in shares.items():
        if name not in names:
            hint = nearest(str(name), names)
            raise ValueError(f"`{label}` names {shown(name)}, which is not among {list(names)}.{hint}")
        check_number(f"{label}.{name}", share, 0, 1)
    if not any(shares.values()):
        raise ValueError(f"`{label}` is {shown(shares)}, which trains nothing. Remove it.")


def shares_of(rounds: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """By objective the share of its rows in every round."""
    return {name: tuple(float(shares.get(name, 0)) for shares in rounds) for name in names}
