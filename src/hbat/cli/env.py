"""What `hbat env` prints: versions, devices and settings, to be copied into a bug report."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
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
_PREFIXES = (
    "ACCELERATE_", "BNB_", "CUBLAS_", "CUDA_", "DEEPSPEED_", "DS_", "FSDP_", "HF_", "HIP_", "HSA_", "LOCAL_RANK",
    "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "RANK", "ROCR_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRL_",
    "WORLD_SIZE",
)  # fmt: skip
_SECRET = re.compile("AUTH|CRED|KEY|PASS|SECRET|TOKEN(?!IZERS)", re.IGNORECASE)
#: Switches, numbers and words: no URL, no path, which is private, and nothing as long as a token.
_HARMLESS = re.compile(r"(?!.*[A-Za-z0-9]{20})[\w.,:=+-]*")


def describe_environment() -> str:
    """Describe what a run would run with, one line for each thing. No token and no path is in it."""
    return "\n".join([
        f"- hbat: {_hbat()}",
        f"- Python: {platform.python_version()}",
        f"- Platform: {platform.platform()}",
        *(f"- {name}: {_version(name)}" for name in _PACKAGES),
        *_devices(),
        *_accelerate(),
        "- Environment variables:",
        *_settings({name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}),
    ])


def _hbat() -> str:
    try:
        hbat = metadata.distribution(_HBAT)
    except metadata.PackageNotFoundError:
        return "not installed"
    origin = json.loads(hbat.read_text("direct_url.json") or "{}")  # of an installation that is not from an index
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"{hbat.version} (commit {commit})" if commit else hbat.version


def _version(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    return version + "".join(f" (hbat requires {needs})" for needs in _unmet(name, version))


def _unmet(name: str, version: str) -> Iterator[str]:
    try:
        required = map(Requirement, metadata.requires(_HBAT) or ())
    except metadata.PackageNotFoundError:
        return
    found = {str(needs.specifier): needs.specifier for needs in required if needs.name.replace("_", "-") == name}
    yield from (text for text, specifier in found.items() if not specifier.contains(version, prereleases=True))


def _devices() -> Iterator[str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"- CPU: {platform.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB"
    try:
        import torch  # noqa: PLC0415 - heavy, and may be what is broken

        builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
        built = [f"{name} {version}" for name, version in builds.items() if version]
        built += ["MPS"] if torch.backends.mps.is_built() else []
        count = torch.accelerator.device_count()
        yield f"- torch built for: {', '.join(built) or 'the CPU alone'}; devices found: {count}"
        yield from (f"- Device {index}: {_device(torch, index)}" for index in range(count))
    except Exception as error:  # noqa: BLE001 - drivers and broken installations raise anything
        yield f"- torch fails: {type(error).__name__}: {' '.join(str(error).split())}"


def _device(torch: Any, index: int) -> str:
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    if not hasattr(module, "is_bf16_supported"):  # as that of MPS
        return str(kind)
    properties = module.get_device_properties(index)
    has_bf16 = module.is_bf16_supported(including_emulation=False)
    return f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, {'bf16' if has_bf16 else 'no bf16'}"


def _accelerate() -> Iterator[str]:
    try:
        from accelerate.commands.config import default_config_file, load_config_from_file  # noqa: PLC0415 - heavy

        found = load_config_from_file(default_config_file).to_dict() if Path(default_config_file).is_file() else {}
    except Exception as error:  # noqa: BLE001 - it may be what is broken
        yield f"- accelerate's default configuration: {type(error).__name__}: {' '.join(str(error).split())}"
    else:
        yield f"- accelerate's default configuration:{'' if found else ' none'}"
        yield from _settings(found)


def _settings(values: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{section}{key}"
        if isinstance(value, Mapping):
            yield from _settings(value, f"{name}.")
            continue
        harmless = _HARMLESS.fullmatch(str(value)) and not _SECRET.search(name)
        yield f"  - {name}: {value if harmless else '(set, not shown)'}"
