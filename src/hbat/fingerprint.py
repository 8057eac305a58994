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
from hbat.data_digest import data_digest
from hbat.ewc.parameters import canonical_name
from hbat.ewc.shards import whole_of
from hbat.ewc_config import EWCConfig
from hbat.processes import process_count

_SAMPLED_VALUES = 64
#: Fields of a stage's configuration that say where and how much is logged, kept or evaluated and how rows are brought
#: to the device, not what is trained; and the options of FSDP, which say where the weights lie.
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
    processing_class: Any = None,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        config: The run's configuration.
        sections: Configuration of each objective.
        datasets: Training data of each objective.
        parameters: Trainable parameters by name.
        model: The model, whose frozen weights are what an adapter is trained on.
        rewards: Names of the reward functions by objective.
        processing_class: The tokenizer.

    Returns:
        Values that JSON can hold.
    """
    shapes = {name: list(each.shape) for name, each in parameters.items()}
    described: dict[str, Any] = {
        "run": {
            "objectives": config.objective_names,
            "num_rounds": config.num_rounds,
            "seed": config.seed,
            "processes": process_count(),
            "optimizer_state": config.optimizer_state,
            "lr_schedule": {name: config.lr_schedule_of(name) for name in config.objective_names},
            "average": {name: config.average_of(name) for name in config.objective_names},
        },
        "ewc": None if config.ewc is None else _plain_ewc(config.ewc),
        "data": {
            name: {
                "rows": len(each),
                "columns": sorted(each.column_names),
                "content": data_digest(each),
            }
            for name, each in datasets.items()
        },
        "parameters": {"tensors": len(shapes), "shapes": _digest(shapes)},
    }
    if rewards:  # left out where there are none, so that older runs stay the same
        described["run"]["rewards"] = {name: list(each) for name, each in rewards.items()}
    if "ppo" in config.objective_names:
        described["run"]["ppo_backend"] = config.ppo_backend
    if model is not None:
        described["parameters"]["frozen"] = _frozen(model)
        quantisation = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantisation is not None:  # also says in which precision the frozen weights compute
            described["parameters"]["quantization"] = _digest(_plain(quantisation))
    if processing_class is not None:
        described["tokenizer"] = _tokenizer(processing_class)
    for name, args in sections.items():
        described[name] = {key: value for key, value in args.to_dict().items() if not _is_incidental(key)}
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def _plain_ewc(config: EWCConfig) -> dict[str, Any]:
    # Not where the anchor lies, which changes no result.
    return {key: value for key, value in asdict(config).items() if key != "anchor_device"}


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
            values = whole_of(each.detach()).reshape(-1)[:_SAMPLED_VALUES]
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(quantisation: Any) -> Any:
    return quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation


def _tokenizer(processing_class: Any) -> dict[str, str]:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's own
    special = getattr(tokenizer, "special_tokens_map", {})
    return {
        "vocabulary": _digest([tokenizer.get_vocab(), special]),
        "template": _digest(getattr(processing_class, "chat_template", None)),
    }


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
