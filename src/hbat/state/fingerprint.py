"""What a run trains on what, as plain values: runs with equal fingerprints train the same thing on the same data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.data.digest import data_digest
from hbat.engines.engine import PLACEMENT_FIELDS
from hbat.engines.processes import process_count
from hbat.engines.sharded import whole_of
from hbat.ewc.parameters import canonical_name

_LIBRARIES = ("hbat-trl", "trl", "transformers", "accelerate", "peft", "datasets", "torch")
_SAMPLED_VALUES = 64

#: Fields of a trainer's configuration that say where and how much is logged, saved or evaluated and how rows reach the
#: device, not what is trained.
_INCIDENTAL = {
    "batch_eval_metrics", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "disable_tqdm", "do_eval",
    "local_rank", "output_dir", "per_device_eval_batch_size", "project", "push_to_hub", "report_to",
    "run_name", "torch_empty_cache_steps", *PLACEMENT_FIELDS,
}  # fmt: skip
_INCIDENTAL_PREFIXES = ("eval_", "hub_", "include_", "log_", "logging_", "save_", "trackio_")
#: `to_dict` masks every field that ends in `_token` as a secret. These are none, and decide what is trained.
_MASKED = ("eos_token", "pad_token")


@dataclass(frozen=True)
class Fingerprint:
    """A run in plain values.

    Attributes:
        values: What decides the result, by section: `run`, `ewc`, `data`, `parameters`, `tokenizer`, and one for each
            objective.
        given: Names of the values that the user has set, by section; all others are defaults.
        versions: Versions of the libraries that the defaults come from.
    """

    values: dict[str, Any]
    given: dict[str, list[str]]
    versions: dict[str, str]


def fingerprint(
    config: HBATConfig,
    sections: Mapping[str, TrainingArguments],
    datasets: Mapping[str, Dataset],
    parameters: Mapping[str, Tensor],
    model: Any = None,
    rewards: Mapping[str, Sequence[str]] | None = None,
    processing_class: Any = None,
    dropped: Mapping[str, int] | None = None,
) -> Fingerprint:
    """Describe a run as two of them are compared.

    Of the model the frozen weights under an adapter count. `dropped` faulty rows are not among those of `datasets`;
    `rewards` are names of the reward functions by objective.
    """
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    run = {
        "objectives": config.objective_names,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "processes": process_count(),
        "replay": config.replay_share,
        "optimizer_state": config.optimizer_state,
        "keep_adapter_dtype": config.keep_adapter_dtype,
        "lr_schedule": {name: config.lr_schedule_of(name) for name in config.objective_names},
        "end_weight": config.end_weight,
    }
    optional = {
        "rounds": config.rounds,
        "trainers": config.trainers,
        "continue_from": config.continue_from and Path(config.continue_from).resolve().name,  # folders are moved
        "rewards": rewards,
        "ppo_backend": config.ppo_backend if "ppo" in (*config.objective_names, *config.trainers.values()) else None,
    }
    described: dict[str, Any] = {
        "run": run | {name: value for name, value in optional.items() if value},
        "ewc": None if config.ewc is None else asdict(config.ewc),
        "data": {
            name: {
                "rows": len(dataset),
                "columns": sorted(dataset.column_names),
                "content": data_digest(dataset),
                "dropped": (dropped or {}).get(name, 0),
            }
            for name, dataset in datasets.items()
        },
        "parameters": {"tensors": len(shapes), "shapes": _digest(shapes)},
    }
    if model is not None:
        described["parameters"]["frozen"] = frozen_digest(model)
        quantization = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantization is not None:  # also says in which precision the frozen weights compute
            plain = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
            described["parameters"]["quantization"] = _digest(plain)
    if processing_class is not None:
        described["tokenizer"] = _tokenizer(processing_class)
    described |= {name: _trained_with(args) for name, args in sections.items()}
    given = {"ewc": given_fields(config.ewc)}
    for name, objective in zip(config.objective_names, config.objectives, strict=True):
        given[name] = sorted({*given_fields(config.section(objective)), *config.shared_fields})
    return Fingerprint(json.loads(json.dumps(described, default=str)), given, _versions())


def _trained_with(args: TrainingArguments) -> dict[str, Any]:
    values = args.to_dict()
    values |= {key: getattr(args, key) for key in _MASKED if key in values}
    return {k: v for k, v in values.items() if k not in _INCIDENTAL and not k.startswith(_INCIDENTAL_PREFIXES)}


def given_fields(configuration: Any) -> list[str]:
    """Names of the fields that are not at their defaults."""
    if configuration is None or isinstance(configuration, Mapping):
        return sorted(configuration or ())
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(configuration)
    }
    return [name for name, default in defaults.items() if getattr(configuration, name) != default]


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):  # an optional one
            found[name] = version(name)
    return found


def frozen_digest(model: nn.Module) -> str:
    """Digest of the parameters that are not trained."""
    return weights_digest({name: weight for name, weight in model.named_parameters() if not weight.requires_grad})


def weights_digest(parameters: Mapping[str, Tensor]) -> str:
    """Digest of parameters by name. The beginning of every tensor tells models apart and is cheap."""
    # Not where a model came from: folders are moved.
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{canonical_name(name)} {list(parameter.shape)} {parameter.dtype} ".encode())
        if not parameter.is_meta:  # offloaded by accelerate
            values = whole_of(parameter.detach()).reshape(-1)[:_SAMPLED_VALUES]
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


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
