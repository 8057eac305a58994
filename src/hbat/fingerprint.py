"""What a run is, as plain values: two runs with equal fingerprints train the same thing on the same data."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from datasets import Dataset
from torch import Tensor

from hbat.config import HBATConfig

_SAMPLED_ROWS = 1000
#: Fields of a stage's configuration that say where and how much is logged or kept, not what is trained.
_INCIDENTAL = {
    "disable_tqdm", "hub_token", "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_dir",
    "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "output_dir", "project",
    "report_to", "run_name", "save_on_each_node", "save_steps", "save_strategy", "save_total_limit",
    "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
}  # fmt: skip


class _Section(Protocol):
    """A stage's configuration, of which nothing but its values matters here."""

    def to_dict(self) -> dict[str, Any]: ...


def fingerprint(
    config: HBATConfig,
    sections: Mapping[str, _Section],
    datasets: Mapping[str, Dataset],
    parameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Describe a run.

    Args:
        config: The run's configuration.
        sections: Configuration of each objective.
        datasets: Training data of each objective.
        parameters: Trainable parameters by name.

    Returns:
        Values that JSON can hold.
    """
    shapes = {name: list(each.shape) for name, each in parameters.items()}
    described = {
        "run": {
            "objectives": config.objective_names,
            "num_rounds": config.num_rounds,
            "seed": config.seed,
            "optimizer_state": config.optimizer_state,
            "lr_schedule": {name: config.lr_schedule_of(name) for name in config.objective_names},
            "average": {name: config.average_of(name) for name in config.objective_names},
        },
        "ewc": None if config.ewc is None else asdict(config.ewc),
        "data": {name: _describe(dataset) for name, dataset in datasets.items()},
        "parameters": {"tensors": len(shapes), "shapes": _digest(shapes)},
    }
    for name, args in sections.items():
        described[name] = {key: value for key, value in args.to_dict().items() if key not in _INCIDENTAL}
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List what changed between two fingerprints.

    Args:
        before: The one on disk.
        now: The present one.
        prefix: Name of the section.

    Returns:
        Lines such as `dpo.beta: 0.1 -> 0.2`.
    """
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


def _describe(dataset: Dataset) -> dict[str, Any]:
    step = max(1, len(dataset) // _SAMPLED_ROWS)
    rows = dataset[list(range(0, len(dataset), step))]
    return {"rows": len(dataset), "columns": sorted(dataset.column_names), "sample": _digest(rows)}


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
