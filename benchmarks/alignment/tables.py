"""The tables of docs/does-it-work.md, from records of the evidence: answers that are right and in style, percent."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean

from metrics import Record, area, chosen_without_own_seed, interval, line
from plan import PATH, TWO_STAGE

DEFAULT = "path strength 0.5"
_HBAT = "**HBAT** (`path`, strength 0.5)"
HEATS = {"T0": "greedy", "T0.75": "sampled at 0.75", "T1": "sampled at 1"}
_END = "1"  # share of the averaging line
_LAST = "default minus this, 0.75"

Runs = Mapping[str, Mapping[int, Record]]  # of a regime and base: by method and seed
Row = tuple[str, Sequence[str]]  # label and cells

#: Kinds of importance: their labels, and how their methods' names begin.
_SOURCES = {
    "`path`, one value per tensor": "path granularity tensor",
    "`relative`": "relative strength",
    "`displacement`, the paper's": "displacement",
    "`preset: authors`": "authors strength",
    "`fisher`": "fisher",
    "`uniform`": "uniform",
    "`random`": "random",
}
#: Other choices of the penalty, likewise.
_CHOICES = {
    "`relative`, one value per tensor": "relative granularity tensor",
    "`freeze: 0.2` alone": "freeze",
    "`method: proximal`": "path proximal",
    "`damping: 0.1`": "path damping 0.1",
    "`damping: 10`": "path damping 10",
}
#: Other ways to keep what SFT taught: label and family.
_RIVALS = {
    "replay of SFT rows": "replay",
    "TRL's `loss_type: [sigmoid, sft]`": "sigmoid + sft",
    "alternation without a penalty": "alternation",
    "joint steps": "joint",
    "ALRIGHT": "alright",
    "MAXRIGHT": "maxright",
}
#: More than one round: label, and the beginnings and ends of the methods' names.
_ROUNDS = {
    "2 equal rounds": ("path strength", "N=2"),
    "4 equal rounds": ("path strength", "N=4"),
    "8 equal rounds": ("path strength", "N=8"),
    "4 rounds, instructions early and pairs late": ("rounds early", ""),
    "2 rounds, the second with 30 % of SFT's and 90 % of DPO's rows": ("rounds last", ""),
    "4 equal rounds, SFT's rate falling": ("rounds decay", ""),
    "4 equal rounds, one schedule for each objective": ("rounds one schedule", ""),
    "`preset: authors`, 4 equal rounds": ("authors", "N=4"),
}
_REGIMES = {
    ("main", "small"): "the main table",
    ("main", "large"): "the same, larger base",
    ("half", "small"): "half of the tasks have pairs",
    ("weak", "small"): "weak conflict",
    ("strong", "small"): "strong conflict",
    ("time2", "small"): "tasks arrive in two parts",
    ("time4", "small"): "tasks arrive in four parts",
}


def runs_of(records: Sequence[Record], regime: str, base: str) -> dict[str, dict[int, Record]]:
    """Take the runs of a regime and base, by method and seed."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if (record["regime"], record["base"]) == (regime, base):
            found.setdefault(record["method"], {})[record["seed"]] = record
    return found


def _family(runs: Runs, name: str) -> list[str]:
    return [method for method, by_seed in runs.items() if next(iter(by_seed.values()))["family"] == name]


def _seeds(runs: Runs, *methods: str) -> list[int]:
    """Seeds that all methods have."""
    return sorted(set.intersection(*(set(runs[method]) for method in methods)))


def _scores(runs: Runs, method: str, share: str, heat: str, seeds: Sequence[int], group: str = "all") -> list[float]:
    metric = "both" if group == "all" else "accuracy"
    return [100 * runs[method][seed]["scores"][share][heat][group][metric] for seed in seeds]


def _best(runs: Runs, methods: Sequence[str], heat: str, seeds: Sequence[int], shares: Sequence[str]) -> list[float]:
    # The method and point that are best on the mean of these prompts and seeds, which favors who has more of them.
    return max((_scores(runs, method, share, heat, seeds) for method in methods for share in shares), key=fmean)


def _points(runs: Runs, methods: Sequence[str]) -> list[str]:
    return list(next(iter(runs[methods[0]].values()))["scores"])


def _cells(runs: Runs, methods: Sequence[str], seeds: Sequence[int], shares: Sequence[str] = (_END,)) -> list[str]:
    return [f"{fmean(_best(runs, methods, heat, seeds, shares)):.1f}" for heat in HEATS]


def minus(own: Sequence[float], other: Sequence[float]) -> str:
    """Write the mean of differences, paired by seed, with its 95 % interval."""
    middle, half = interval([a - b for a, b in zip(own, other, strict=True)])
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def _differences(
    runs: Runs, own: str, others: Sequence[str], seeds: Sequence[int], shares: Sequence[str] = (_END,)
) -> list[str]:
    # The best of a method's points (by default its end) minus the best of all points of others.
    points = _points(runs, others)
    return [minus(_best(runs, [own], heat, seeds, shares), _best(runs, others, heat, seeds, points)) for heat in HEATS]


def _fair_differences(runs: Runs, others: Sequence[str], seeds: Sequence[int]) -> list[str]:
    # The default's end minus, on every seed, the point of others that is best on the other seeds.
    points = [(method, share) for method in others for share in _points(runs, others)]
    cells = []
    for heat in HEATS:
        scores = [dict(zip(seeds, _scores(runs, *point, heat, seeds), strict=True)) for point in points]
        chosen = chosen_without_own_seed(scores)
        cells.append(minus(_scores(runs, DEFAULT, _END, heat, seeds), [chosen[seed] for seed in seeds]))
    return cells


def _areas(runs: Runs, seeds: Sequence[int]) -> list[str]:
    # Under the front of strengths, minus that of as many rates of two-stage training; lines are filled in.
    known = [
        [each["method"] for each in methods if set(seeds) <= set(runs.get(each["method"], {}))]
        for methods in (PATH, TWO_STAGE)
    ]
    count = min(map(len, known))
    cells = []
    for heat in HEATS:
        own, other = (
            [100 * area([line(runs[method][seed], heat) for method in methods[:count]]) for seed in seeds]
            for methods in known
        )
        cells.append(minus(own, other))
    return cells


def _rate(method: str) -> float:
    return float(method.rsplit(" ", 1)[1])


def _table(rows: Sequence[Row], heads: Sequence[str] = tuple(HEATS.values())) -> str:
    lines = [["", *heads], ["---"] * (1 + len(heads)), *([label, *cells] for label, cells in rows)]
    return "\n".join(("| " + " | ".join(cells) + " |").replace("|  |", "| |") for cells in lines)


def _main(runs: Runs) -> str:
    rivals = sorted(_family(runs, "two-stage"), key=_rate)
    seeds, points = _seeds(runs, DEFAULT, *rivals), _points(runs, rivals)
    count = len(rivals) * (len(points) - 1)  # the line's start is SFT's end
    alone = ["SFT only"] if "SFT only" in runs and set(seeds) <= set(runs["SFT only"]) else []
    return _table([
        *((method.replace("only", "alone"), _cells(runs, [method], seeds)) for method in alone),
        *((f"{method}, end", _cells(runs, [method], seeds)) for method in rivals),
        (f"two-stage, best of {count}", _cells(runs, rivals, seeds, points)),
        (f"{_HBAT}, end", _cells(runs, [DEFAULT], seeds)),
        (f"HBAT, best of {len(points) - 1}", _cells(runs, [DEFAULT], seeds, points)),
        (f"HBAT, end, minus two-stage, best of {count}", _differences(runs, DEFAULT, rivals, seeds)),
        (f"HBAT, best of {len(points) - 1}, minus that", _differences(runs, DEFAULT, rivals, seeds, points)),
        (f"HBAT, end, minus two-stage, one of {count} chosen on other seeds", _fair_differences(runs, rivals, seeds)),
    ])  # fmt: skip


def _strengths(runs: Runs) -> str:
    found = []
    for method in _family(runs, "path"):
        record = next(iter(runs[method].values()))
        if set(record["options"]["ewc"]) == {"source", "strength"} and set(runs[DEFAULT]) <= set(runs[method]):
            found.append((record["rate"], record["options"]["ewc"]["strength"], method))
    seeds = _seeds(runs, *(method for _, _, method in found))
    rows = [
        (f"{strength:g}, DPO at {rate:g}", _cells(runs, [method], seeds)) for rate, strength, method in sorted(found)
    ]
    return _table(rows)


def _with_default(runs: Runs, chosen: Mapping[str, str], seeds: Sequence[int]) -> str:
    # Ends of methods by label, and the default minus each.
    own = _scores(runs, DEFAULT, _END, "T0.75", seeds)
    rows: list[Row] = [(f"{_HBAT}, the default", [*_cells(runs, [DEFAULT], seeds), ""])]
    for label, method in chosen.items():
        last = minus(own, _scores(runs, method, _END, "T0.75", seeds))
        rows.append((label, [*_cells(runs, [method], seeds), last]))
    return _table(rows, [*HEATS.values(), _LAST])


def _chosen(runs: Runs, methods: Sequence[str], seeds: Sequence[int]) -> str:
    return max(methods, key=lambda method: fmean(_scores(runs, method, _END, "T0.75", seeds)))


def _sources(runs: Runs, starts: Mapping[str, str] = _SOURCES) -> str:
    found = {
        label: [method for method in runs if method.startswith(start) and "N=" not in method]
        for label, start in starts.items()
        if any(method.startswith(start) for method in runs)
    }
    seeds = _seeds(runs, DEFAULT, *(method for methods in found.values() for method in methods))
    chosen = {}
    for label, methods in found.items():
        best = _chosen(runs, methods, seeds)
        chosen[f"{label} ({next(iter(runs[best].values()))['options']['ewc']['strength']:g})"] = best
    return _with_default(runs, chosen | {"no penalty": "two-stage 6e-4"}, seeds)


def _rivals(runs: Runs) -> str:
    found = {label: methods for label, name in _RIVALS.items() if (methods := _family(runs, name))}
    seeds = _seeds(runs, DEFAULT, *(method for methods in found.values() for method in methods))
    chosen = {f"{label}, best of {len(methods)}": _chosen(runs, methods, seeds) for label, methods in found.items()}
    return _with_default(runs, chosen, seeds)


def _rounds(runs: Runs) -> str:
    found = {
        label: [method for method in runs if method.startswith(start) and method.endswith(end)]
        for label, (start, end) in _ROUNDS.items()
        if any(method.startswith(start) and method.endswith(end) for method in runs)
    }
    seeds = _seeds(runs, DEFAULT, *(method for methods in found.values() for method in methods))
    rows: list[Row] = [("**one round**, strength 0.5, the default", _cells(runs, [DEFAULT], seeds))]
    rows += [
        (f"{label}, best of {len(methods)}" if len(methods) > 1 else label, _cells(runs, methods, seeds))
        for label, methods in found.items()
    ]
    return _table(rows)


def _ppo(runs: Runs) -> str:
    rivals = sorted(_family(runs, "PPO two-stage"), key=_rate)
    own = [method for method in runs if method.startswith("PPO path")]
    seeds, points = _seeds(runs, *rivals, *own), _points(runs, rivals)
    count = len(rivals) * (len(points) - 1)
    return _table([
        *((f"{method.removeprefix('PPO ')}, end", _cells(runs, [method], seeds)) for method in rivals),
        (f"two-stage, best of {count}", _cells(runs, rivals, seeds, points)),
        *((f"`path`, {method.removeprefix('PPO path ')}, end", _cells(runs, [method], seeds)) for method in own),
        (f"strength 0.5, end, minus two-stage, best of {count}",
         _differences(runs, f"PPO {DEFAULT} 0.001", rivals, seeds)),
    ])  # fmt: skip


def _regimes(records: Sequence[Record]) -> str:
    rows: list[Row] = []
    for place, label in _REGIMES.items():
        runs = runs_of(records, *place)
        if DEFAULT in runs:
            rivals = _family(runs, "two-stage")
            seeds = _seeds(runs, DEFAULT, *rivals)
            cells = [" / ".join(_cells(runs, [DEFAULT], seeds)), *_differences(runs, DEFAULT, rivals, seeds)]
            rows.append((f"{label} ({len(seeds)} seeds)", [*cells, *_areas(runs, seeds)]))
    return _table(rows, ["HBAT, end", "minus two-stage, greedy", "0.75", "1", "areas, greedy", "0.75", "1"])


def _over_time(runs: Runs) -> str:
    rivals, old = sorted(_family(runs, "two-stage"), key=_rate), _family(runs, "old rows")
    seeds, points = _seeds(runs, DEFAULT, *rivals, *old), _points(runs, rivals)
    groups = list(next(iter(runs[DEFAULT].values()))["scores"][_END]["T0"])[1:]

    def end(label: str, method: str) -> Row:
        ages = (fmean(_scores(runs, method, _END, "T0", seeds, group)) for group in groups)
        return label, [*_cells(runs, [method], seeds), " / ".join(f"{age:.0f}" for age in ages)]

    lines = {label: methods for label, methods in (("two-stage", rivals), ("old rows", old)) if methods}
    both = [method for method in _family(runs, "path, old rows") if set(seeds) <= set(runs[method])]
    rows = [end(f"{method}, end", method) for method in (*rivals, *old)]
    rows += [
        (f"{label}, best of {len(methods) * (len(points) - 1)}", [*_cells(runs, methods, seeds, points), ""])
        for label, methods in lines.items()
    ]
    rows.append(end(f"{_HBAT}, end, no old rows", DEFAULT))
    rows += [end(f"HBAT with {method.partition(', ')[2]}, end", method) for method in both]
    rows += [
        (f"HBAT, no old rows, minus {label}, best", [*_differences(runs, DEFAULT, methods, seeds), ""])
        for label, methods in lines.items()
    ]
    return _table(rows, [*HEATS.values(), f"right, greedy: {' / '.join(groups)}"])


def tables(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Name and text of every table that there are runs for."""
    small, large = (runs_of(records, "main", base) for base in ("small", "large"))
    both, ppo = ("path", "two-stage"), ("PPO path", "PPO two-stage")
    made = [
        ("Main table", _main, small, both),
        ("Main table, larger base", _main, large, both),
        ("Strengths", _strengths, small, both),
        ("Strengths, larger base", _strengths, large, both),
        ("Importance", _sources, small, both),
        ("Choices", partial(_sources, starts=_CHOICES), small, both),
        ("Other ways", _rivals, small, both),
        ("Rounds", _rounds, small, both),
        ("PPO", _ppo, small, ppo),
        ("Tasks in two parts", _over_time, runs_of(records, "time2", "small"), both),
        ("Tasks in four parts", _over_time, runs_of(records, "time4", "small"), both),
    ]
    for name, make, runs, families in made:
        if all(_family(runs, each) for each in families):
            yield name, make(runs)
    yield "Regimes", _regimes(records)
