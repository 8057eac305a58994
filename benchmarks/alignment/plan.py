"""The runs of the evidence, the most important first, so that a programme that is cut off leaves a usable table."""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from spec import Spec

RATE = 6e-4  # of preference stages where it is not what a family varies
RATES = {"1e-4": 1e-4, "2e-4": 2e-4, "3e-4": 3e-4, "6e-4": 6e-4, "1e-3": 1e-3, "2e-3": 2e-3}
PPO_RATES = {"1e-4": 1e-4, "3e-4": 3e-4, "1e-3": 1e-3}
ROUNDS = (2, 4, 8)

Method = dict[str, Any]  # fields of a `Spec` beside regime, base and seed


def _plain(name: str, **fields: Any) -> Method:
    return {
        "method": f"two-stage {name}", "family": "two-stage", "rate": RATES[name],
        "options": {"ewc": None, "optimizer_state": "reset"}, **fields,
    }  # fmt: skip


def _ewc(family: str, rounds: int = 1, rate: float = RATE, **ewc: Any) -> Method:
    ewc.setdefault("strength", 1.0)
    given = " ".join(f"{key} {value}" for key, value in ewc.items() if key not in {"source", "preset"})
    suffix = (f" N={rounds}" if rounds > 1 else "") + (f" {rate:g}" if rate != RATE else "")
    return {
        "method": f"{family} {given}{suffix}", "family": f"{family}{f' N={rounds}' if rounds > 1 else ''}",
        "rate": rate, "options": {"ewc": ewc, "num_rounds": rounds},
    }  # fmt: skip


def _alternation(rounds: int, rate: str) -> Method:
    return {
        "method": f"alternation N={rounds} {rate}", "family": "alternation", "rate": RATES[rate],
        "options": {"ewc": None, "num_rounds": rounds},
    }  # fmt: skip


def _replay(share: float, rate: str) -> Method:
    return {
        "method": f"replay {share:g} {rate}", "family": "replay", "rate": RATES[rate],
        "options": {"ewc": None, "replay": {"sft": share}},
    }  # fmt: skip


SFT_ONLY: Method = {"method": "SFT only", "family": "SFT only", "preference": "", "options": {"ewc": None}}
TWO_STAGE = [_plain(rate) for rate in ("6e-4", "1e-3", "3e-4", "1e-4", "2e-4", "2e-3")]
PATH = [_ewc("path", source="path", strength=strength) for strength in (0.5, 1.0, 0.25, 0.12, 2.0)]
PATH += [_ewc("path", source="path", rate=rate) for rate in (3e-4, 1e-3)]

SOURCES = [
    _ewc(source, source=source, strength=strength)
    for strength, source in product((1.0, 4.0, 0.25), ("relative", "displacement", "fisher", "uniform", "random"))
]
GRANULARITY = [
    _ewc(source, source=source, granularity="tensor", strength=strength)
    for strength, source in product((1.0, 4.0), ("path", "relative"))
]
DAMPING = [
    _ewc("path", source="path", damping=damping, strength=strength)
    for damping, strength in product((0.1, 10.0), (1.0, 0.5))
]
PROXIMAL = [_ewc("path proximal", source="path", method="proximal", strength=strength) for strength in (1.0, 0.5)]
AUTHORS = [_ewc("authors", rounds, preset="authors", strength=100.0) for rounds in (4, 1)]
FREEZE = [_ewc("freeze", rounds, source="path", freeze=0.2, strength=0.0) for rounds in (1, 4)]
REPLAY = [_replay(share, rate) for share, rate in ((0.1, "6e-4"), (0.25, "6e-4"), (0.1, "3e-4"), (0.25, "3e-4"))]
ALTERNATION = [_alternation(rounds, rate) for rounds, rate in product(ROUNDS, ("6e-4", "3e-4"))]
#: The map of rounds and strengths; its first column and its row of one round are above.
MAP = [
    _ewc("path", rounds, source="path", strength=strength) for rounds, strength in product(ROUNDS, (1, 0.25, 4, 0.5))
]
MAP += [_ewc("path", source="path", strength=4.0)]

#: More rounds given their best chance: instructions early and preferences late, rates that fall, preferences last.
EARLY = [{"sft": 0.4, "dpo": 0.1}, {"sft": 0.3, "dpo": 0.2}, {"sft": 0.2, "dpo": 0.3}, {"sft": 0.1, "dpo": 0.4}]
LAST = [{"sft": 0.7, "dpo": 0.1}, {"sft": 0.3, "dpo": 0.9}]
CHANCES: dict[str, dict[str, Any]] = {
    "early": {"rounds": EARLY},
    "last": {"rounds": LAST},
    "decay": {"num_rounds": 4, "lr_schedule": {"sft": "decay"}},
    "early, decay": {"rounds": EARLY, "lr_schedule": {"sft": "decay"}},
    "last, decay": {"rounds": LAST, "lr_schedule": {"sft": "decay"}},
    "one schedule": {"num_rounds": 4, "lr_schedule": "run"},
}
CHANCE = [
    {
        "method": f"rounds {name} {strength:g}", "family": "rounds at their best", "rate": RATE,
        "options": {"ewc": {"source": "path", "strength": strength} if strength else None, **options},
    }
    for strength, (name, options) in product((0.5, 0.25, 0.0), CHANCES.items())
]  # fmt: skip

#: Over time: later parts train with a tenth or a quarter of old rows in place of new ones.
OLD_ROWS = [
    _plain("3e-4", method=f"old rows {share:g} {rate}", family="old rows", rate=RATES[rate], old_rows=share,
           options={"ewc": None})
    for share, rate in ((0.1, "6e-4"), (0.25, "6e-4"), (0.1, "3e-4"), (0.25, "3e-4"))
]  # fmt: skip
#: The same with the penalty.
OLD_ROWS_PATH = [
    _ewc("path", source="path", strength=0.5) | {
        "method": f"path strength 0.5, old rows {share:g} {rate:g}", "family": "path, old rows", "rate": rate,
        "old_rows": share,
    }
    for share, rate in ((0.1, 6e-4), (0.1, 1e-3))
]  # fmt: skip
#: TRL's own SFT term on the chosen answers of the pairs.
SFT_TERM = [
    _plain(rate, method=f"sigmoid + {weight:g} sft {rate}", family="sigmoid + sft",
           section={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]})
    for weight, rate in product((0.1, 1.0), ("6e-4", "3e-4"))
]  # fmt: skip
#: Without stages, with as many steps as a run of stages; joint ones, of two mini-batches, are as many as SFT's.
MIXED = [
    {
        "method": f"{kind} {share:g} {rate:g}", "family": kind, "rate": rate, "options": {},
        "mixed": {"kind": kind, "share": share, "steps": 256 if kind == "joint" else 384},
    }
    for share, rate, kind in product((0.5, 0.67), (1e-3, 6e-4), ("joint", "alright", "maxright"))
]  # fmt: skip
PPO = [
    method | {"method": f"PPO {method['method']}", "family": f"PPO {method['family']}", "preference": "ppo"}
    for method in (
        *[_plain("3e-4", method=f"two-stage {rate}", rate=value) for rate, value in PPO_RATES.items()],
        *[_ewc("path", rate=1e-3, source="path", strength=strength) for strength in (1.0, 0.5, 2.0)],
        *[_ewc("path", rounds, rate=1e-3, source="path", strength=0.5) for rounds in (2, 4)],
    )
]
SMOKE = [_plain("6e-4"), _alternation(2, "6e-4"), MIXED[0]]


def _first(methods: Iterable[Method], name: str, **fields: Any) -> Method:
    found = next(method for method in methods if method["method"] == name)
    return found | {"method": f"{name} {next(iter(fields))}", "family": next(iter(fields)), **fields}


#: Score over steps, and over temperatures: a run of its own each, as they evaluate more.
CURVES = [
    _first(methods, name, score_every=16)
    for methods, name in ((TWO_STAGE, "two-stage 6e-4"), (PATH, "path strength 1.0"), (MAP, "path strength 1 N=4"))
]
HEAT = [
    _first(methods, name, temperatures=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25))
    for methods, name in ((TWO_STAGE, "two-stage 6e-4"), (TWO_STAGE, "two-stage 1e-4"), (PATH, "path strength 1.0"))
]


def plan(seeds: int) -> Iterator[Spec]:
    """List all runs in order: regimes, bases and methods for every seed before the next block."""
    main, few = range(seeds), range(min(3, seeds))
    blocks: list[tuple[str, str, Iterable[int], list[Method]]] = [
        ("main", "small", main, [*TWO_STAGE[:4], *PATH[:4], SFT_ONLY]),
        ("main", "small", main, [*TWO_STAGE[4:], *PATH[4:]]),
        ("time2", "small", main, [*TWO_STAGE[:4], *PATH[:4], *OLD_ROWS, *OLD_ROWS_PATH]),
        ("half", "small", main, [*TWO_STAGE[:4], *PATH[:4]]),
        ("main", "large", main, [*TWO_STAGE[:4], *PATH[:4]]),
        ("time4", "small", main, [*TWO_STAGE[:4], *PATH[:4], *OLD_ROWS]),
        ("main", "small", few, [*ALTERNATION[:4], *REPLAY, *MIXED, *SFT_TERM]),
        ("main", "small", main, [*SOURCES, *GRANULARITY, *AUTHORS]),
        ("main", "small", few, [*MAP, *FREEZE, *DAMPING, *PROXIMAL, *ALTERNATION[4:]]),
        ("main", "small", few, [*CURVES, *HEAT]),
        ("main", "small", few, [*PPO, *CHANCE]),
        ("weak", "small", few, [*TWO_STAGE[:4], *PATH[:4]]),
        ("strong", "small", few, [*TWO_STAGE[:4], *PATH[:4]]),
        ("time2", "large", few, [*TWO_STAGE[:4], *PATH[:4], *OLD_ROWS]),
        ("half", "large", few, [*TWO_STAGE[:4], *PATH[:4]]),
    ]
    for regime, base, which, methods in blocks:
        for seed, method in product(which, methods):
            yield Spec(regime=regime, base=base, seed=seed, **method)


def smoke() -> Iterator[Spec]:
    """List a run of each kind, on a base that has learned nothing."""
    for method in SMOKE:
        yield Spec(regime="main", base="smoke", seed=0, **method)
