"""What stages cost: the rows that a run's state keeps, as entries for reporters, as metrics and in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from hbat.state.plan import Stage

#: What a stage's seconds are spent on beside training, in words.
BESIDE = {"evaluation": "evaluation", "saving": "saving", "ewc": "EWC"}


def tokens_per_second(*costs: Mapping[str, Any]) -> float | None:
    """Tokens per second of training in stages whose trainer counts them; None where none does.

    Of training alone: without evaluating and saving.
    """
    counted = [cost for cost in costs if cost.get("tokens")]
    seconds = sum(cost["seconds"] - cost.get("evaluation", 0.0) - cost.get("saving", 0.0) for cost in counted)
    return sum(cost["tokens"] for cost in counted) / seconds if seconds > 0 else None


def cost_entry(cost: Mapping[str, Any]) -> dict[str, float]:
    """Entries for reporters: seconds, tokens per second, peak memory in GiB, and shares of the seconds."""
    entry = {"seconds": cost["seconds"], "peak_gib": cost["peak_gib"]}
    if (rate := tokens_per_second(cost)) is not None:
        entry["tokens_per_second"] = rate
    entry |= {f"{what}_share": cost.get(what, 0.0) / max(cost["seconds"], 1e-9) for what in BESIDE}
    return {f"{cost['objective']}/cost/{name}": round(value, 4) for name, value in entry.items()}


def run_metrics(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of a whole run, named as transformers does those of a `train()`."""
    rows = list(costs)
    metrics = {"train_runtime": round(sum(cost["seconds"] for cost in rows), 3)}
    if (rate := tokens_per_second(*rows)) is not None:
        metrics["train_tokens_per_second"] = round(rate, 3)
    return metrics


def stage_line(stage: Stage, cost: Mapping[str, Any]) -> str:
    """Say in a line what a stage did: steps, time, speed, memory, and how strong its penalty was."""
    parts = [f"{steps_done(cost)} in {duration(cost['seconds'])}"]
    if (rate := tokens_per_second(cost)) is not None:
        parts.append(f"{tqdm.format_sizeof(rate)} tokens/s")
    parts.append(f"peak {cost['peak_gib']:.1f} GiB")
    parts += [f"{100 * cost[key] / cost['seconds']:.0f} % {what}" for key, what in BESIDE.items() if cost.get(key)]
    if (ratio := cost.get("ewc_ratio")) is not None:
        parts.append(f"the penalty's gradient {ratio:.2f} of the task's")
    return f"Round {stage.round} of {stage.last_round}, {stage.objective}: {', '.join(parts)}."


def steps_done(cost: Mapping[str, Any]) -> str:
    """Say how many steps a stage took, and which of them its costs are about where it was resumed."""
    steps, resumed = f"{cost['steps']} step{'' if cost['steps'] == 1 else 's'}", cost.get("resumed_at")
    return f"{steps}, from {resumed} on" if resumed else steps


def duration(seconds: float) -> str:
    """Write seconds as `m:ss` or `h:mm:ss`."""
    return tqdm.format_interval(round(seconds)).removeprefix("0")
