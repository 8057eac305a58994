"""What `hbat env` prints: versions, devices and settings, to be copied into a bug report."""

import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

_HBAT = "hbat-trl"
_PACKAGES = (
    "torch", "trl", "transformers", "peft", "accelerate", "datasets", "huggingface-hub", "tokenizers", "safetensors",
    "bitsandbytes", "deepspeed", "liger-kernel",
)  # fmt: skip
#: Of the environment variables that change what a run does.
_VARIABLES = re.compile(
    "(ACCELERATE|BNB|CUBLAS|CUDA|DEEPSPEED|FSDP|HF|HIP|MKL|NCCL|OMP|PYTORCH|ROCR|TOKENIZERS|TORCH|TRANSFORMERS|TRL)_"
)
_SECRET = re.compile("AUTH|CRED|KEY|PASS|SECRET|TOKEN(?!IZERS)", re.IGNORECASE)
_PATH = re.compile(r"\S*[/\\]\S*")
#: Switches, numbers and words: no URL, no path, which is private, and nothing as long as a token.
_HARMLESS = re.compile(r"(?!.*[A-Za-z0-9]{20})[\w.,:=+-]*")


def describe_environment() -> str:
    """Describe what a run would run with, one line for each thing. No token and no path is in it."""
    variables = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}
    return "\n".join([
        f"- Python: {platform.python_version()}",
        f"- Platform: {platform.platform()}",
        *(f"- {name}: {_version(name)}" for name in (_HBAT, *_PACKAGES)),
        *_tried("devices", _devices),
        *_tried("accelerate's default configuration", _accelerate),
        "- environment variables:",
        *_settings(variables),
    ])


def _version(name: str) -> str:
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    origin = json.loads(found.read_text("direct_url.json") or "{}")  # where it did not come from an index
    commit = origin.get("vcs_info", {}).get("commit_id")
    needs = {str(known.specifier) for known in _required(name) if not known.specifier.contains(found.version, True)}
    notes = [*([f"commit {commit}"] if commit else []), *(f"hbat requires {versions}" for versions in needs)]
    return f"{found.version} ({', '.join(notes)})" if notes else found.version


def _required(name: str) -> list[Requirement]:
    with suppress(metadata.PackageNotFoundError):  # a source tree that is not installed
        known = map(Requirement, metadata.requires(_HBAT) or ())
        return [requirement for requirement in known if requirement.name.replace("_", "-") == name]
    return []


def _tried(name: str, describe: Callable[[], Iterable[str]]) -> list[str]:
    try:
        return list(describe())
    except Exception as error:  # noqa: BLE001 - drivers and broken installations raise anything
        return [f"- {name}: {type(error).__name__}: {re.sub(_PATH, '(path)', ' '.join(str(error).split()))}"]


def _devices() -> Iterator[str]:
    import torch  # noqa: PLC0415 - heavy, and may be what is broken

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "MPS": torch.backends.mps.is_built()}
    built = " ".join(f"{name} {version}" for name, version in builds.items() if version)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"- CPU: {platform.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB"
    yield f"- torch built for: {built or 'the CPU'}; devices found: {torch.accelerator.device_count()}"
    for index in range(torch.accelerator.device_count()):
        kind: Any = torch.accelerator.current_accelerator()
        module = torch.get_device_module(kind)
        if not hasattr(module, "is_bf16_supported"):  # as that of MPS
            yield f"- device {index}: {kind}"
            continue
        found, bf16 = module.get_device_properties(index), module.is_bf16_supported(including_emulation=False)
        yield f"- device {index}: {found.name}, {found.total_memory / 1e9:.1f} GB, {'bf16' if bf16 else 'no bf16'}"


def _accelerate() -> Iterator[str]:
    from accelerate.commands.config import default_config_file, load_config_from_file  # noqa: PLC0415 - heavy

    found = load_config_from_file(default_config_file).to_dict() if Path(default_config_file).is_file() else {}
    yield f"- accelerate's default configuration:{'' if found else ' none'}"
    yield from _settings(found)


def _settings(values: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{section}{key}.")
            continue
        harmless = _HARMLESS.fullmatch(str(value)) and not _SECRET.search(section + key)
        yield f"  - {section}{key}: {value if harmless else '(set, not shown)'}"
