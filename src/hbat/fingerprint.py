"""What a run is, as plain values: two runs with equal fingerprints train the same thing on the same data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn

from hbat.config import HBATConfig
from hbat.ewc.parameters import canonical_name

_SAMPLED_ROWS = 1000
_SAMPLED_VALUES = 64
#: Sections that are ours: compared key by key. All others are configurations of the host, whose fields come and go
#: from release to release.
_OWN_SECTIONS = {"run", "ewc", "data", "parameters"}
#: Fields of the host's configurations that hold fields of the host themselves, and not what the user chose to pass on.
_HOST_SECTIONS = {"accelerator_config"}
#: Fields of a stage's configuration that say where and how much is logged, kept or evaluated and how rows are brought
#: to the device, not what is trained; and the options of FSDP, under which no run starts.
_INCIDENTAL = {
    "batch_eval_metrics", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "disable_tqdm", "do_eval",
    "fsdp_config", "local_rank", "output_dir", "per_device_eval_batch_size", "project", "push_to_hub", "report_to",
    "run_name", "torch_empty_cache_steps",
}  # fmt: skip
_INCIDENTAL_PREFIXES = ("eval_", "hub_", "include_", "log_", "logging_", "save_", "trackio_")


class _Section(Protocol):
    """A stage's configuration, of which nothing but its values matters here."""

    def to_dict(self) -> dict[str, Any]: ...


def fingerprint(
    config: HBATConfig,
    sections: Mapping[str, _Section],
    datasets: Mapping[str, Dataset],
    parameters: Mapping[str, Tensor],
    model: Any = None,
    rewards: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        config: The run's configuration.
        sections: Configuration of each objective.
        datasets: Training data of each objective.
        parameters: Trainable parameters by name.
        model: The model, whose frozen weights are what an adapter is trained on.
        rewards: Names of the reward functions by objective.

    Returns:
        Values that JSON can hold.
    """
    shapes = {name: list(each.shape) for name, each in parameters.items()}
    described: dict[str, Any] = {
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
    if rewards:  # left out where there are none, so that older runs stay the same
        described["run"]["rewards"] = {name: list(each) for name, each in rewards.items()}
    if "ppo" in config.objective_names:
        described["run"]["ppo_backend"] = config.ppo_backend
    if model is not None:
        described["parameters"]["frozen"] = _frozen(model)
    for name, args in sections.items():
        described[name] = {key: value for key, value in args.to_dict().items() if not _is_incidental(key)}
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what changed between two fingerprints.

    Of the host's configurations only fields that both have are compared, so that another release of the host, which
    adds fields or removes some, goes on with a run.

    Args:
        before: The one on disk.
        now: The present one.

    Returns:
        Lines such as `dpo.beta: 0.1 -> 0.2`.
    """
    return _changes(before, now, "", shared_only=False)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, *, shared_only: bool) -> list[str]:
    lines = []
    for key in sorted(before.keys() & now.keys() if shared_only else before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            of_host = key in _HOST_SECTIONS if prefix else key not in _OWN_SECTIONS
            lines += _changes(old, new, f"{prefix}{key}.", shared_only=of_host)
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


def _is_incidental(key: str) -> bool:
    return key in _INCIDENTAL or key.startswith(_INCIDENTAL_PREFIXES)


def _frozen(model: nn.Module) -> str:
    # Not where the model came from: folders are moved. The beginning of every tensor tells models apart and is cheap.
    digest = hashlib.sha256()
    for name, each in model.named_parameters():
        if each.requires_grad:
            continue
        digest.update(f"{canonical_name(name)} {list(each.shape)} {each.dtype} ".encode())
        if not each.is_meta:  # offloaded by the host
            values = each.detach().reshape(-1)[:_SAMPLED_VALUES]
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe(dataset: Dataset) -> dict[str, Any]:
    step = max(1, len(dataset) // _SAMPLED_ROWS)
    rows = dataset[list(range(0, len(dataset), step))]
    return {"rows": len(dataset), "columns": sorted(dataset.column_names), "sample": _digest(rows)}


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
