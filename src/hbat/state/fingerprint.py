"""What a run is, as plain values: two runs with equal fingerprints train the same thing on the same data."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn

from hbat.config.ewc import EWCConfig
from hbat.config.fields import nearest
from hbat.config.hbat import HBATConfig
from hbat.data.digest import data_digest
from hbat.engines.processes import process_count
from hbat.engines.sharded import whole_of
from hbat.ewc.parameters import canonical_name
from hbat.state.manifest import RunStateError

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
            "end_weight": {name: config.end_weight_of(name) for name in config.objective_names},
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


#: Sections that are ours: compared key by key. All others are configurations of the host, whose fields come and go
#: from release to release.
_OWN_SECTIONS = {"run", "ewc", "data", "parameters", "tokenizer"}


#: Fields of the host's configurations that hold fields of the host themselves, and not what the user chose to pass on.
_HOST_SECTIONS = {"accelerator_config"}


#: What cannot change within a run, with the reason.
_FIXED = {
    "run.objectives": "the plan of the stages is made of them",
    "run.num_rounds": "the data sets are cut into that many parts",
    "run.seed": "it cuts the data sets into parts",
    "run.ppo_backend": "what PPO keeps between its stages is the trainer's own",
    "ewc": "the stages that are done have left importance, or none; `ewc.f_max: 0` switches the penalty off",
    "ewc.source": "the importance accumulated so far is of another kind",
    "ewc.granularity": "the importance accumulated so far is of another kind",
    "data.*.rows": "the parts of later rounds would hold rows of earlier ones",
    "data.*.columns": "the rows mean something else",
    "parameters.*": "the tensors on disk are not those of this model",
    "tokenizer.vocabulary": "the tokens mean something else",
}


_NOTES = {"run.processes": "another number of processes gives other results"}


@dataclass(frozen=True)
class Change:
    """A value that differs between two fingerprints.

    Attributes:
        name: Its dotted name.
        before: Its value on disk; None where there is none.
        now: Its present value; None where there is none.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        note = f" ({_NOTES[self.name]})" if self.name in _NOTES else ""
        return f"{self.name}: {self.before!r} -> {self.now!r}{note}"

    @property
    def fixed(self) -> str | None:
        """Why it cannot change within a run; None if it may."""
        return next((why for pattern, why in _FIXED.items() if fnmatchcase(self.name, pattern)), None)

    def concerns(self, objective: str, others: Sequence[str]) -> bool:
        """Whether a stage is trained otherwise by it.

        Args:
            objective: The stage's objective.
            others: The run's objectives.

        Returns:
            False if it is a value of another objective alone.
        """
        section, *rest = self.name.split(".")
        owner = rest[0] if section == "data" and rest else section
        return owner == objective or owner not in others


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """List what changed between two fingerprints.

    Of the host's configurations only fields that both have are compared, so that another release of the host, which
    adds fields or removes some, goes on with a run.

    Args:
        before: The one on disk.
        now: The present one.

    Returns:
        Changes by name.
    """
    return list(_changes(before, now, "", shared_only=False))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, *, shared_only: bool) -> Iterator[Change]:
    for key in sorted(before.keys() & now.keys() if shared_only else before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            of_host = key in _HOST_SECTIONS if prefix else key not in _OWN_SECTIONS
            yield from _changes(old, new, f"{prefix}{key}.", shared_only=of_host)
        elif old != new:
            yield Change(f"{prefix}{key}", old, new)


def accepted(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], *, output_dir: str
) -> list[Change]:
    """Check that nothing changed but what may.

    Args:
        before: Fingerprint of the run on disk.
        now: The present one.
        allowed: Names that may change, or beginnings of names that end in a dot.
        output_dir: The run's folder, for messages.

    Returns:
        The changes that were allowed.

    Raises:
        RunStateError: If something else changed, something that cannot change, or a name is unknown.
    """
    found = changes(before, now)
    known = sorted({*_names(before), *_names(now), *(each.name for each in found)})
    for name in allowed:
        if name not in known:
            raise RunStateError(
                f"`allow_changed` names {name!r}, which is no value of this run.{nearest(name, known)}"
            )
    named = [each for each in found if any(_covers(name, each.name) for name in allowed)]
    refused = [each for each in found if each not in named or each.fixed]
    if not refused:
        return named
    message = f"`output_dir` {output_dir!r} holds another run: {'; '.join(map(str, refused))}."
    for each in refused:
        if each.fixed and each in named:
            message += f" `{each.name}` cannot change within a run: {each.fixed}."
    if possible := [each.name for each in refused if not each.fixed]:
        message += f" Values may change that `allow_changed` names, here {', '.join(possible)} (`--allow-changed`)."
    raise RunStateError(f"{message} Restore these values to go on with it, or choose another folder.")


def _covers(allowed: str, name: str) -> bool:
    return name.startswith(allowed) if allowed.endswith(".") else name == allowed


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}."
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
