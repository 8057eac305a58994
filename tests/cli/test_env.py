"""What `hbat env` prints for a bug report, and what it keeps to itself."""

import platform
import sys
import types
from importlib import metadata

import accelerate.commands.config as accelerate_config
import pytest
import torch

from hbat.cli.main import main


@pytest.fixture
def lines(capsys, tmp_path, monkeypatch):
    """Run `hbat env` on a machine without a configuration of accelerate; returns its lines."""
    monkeypatch.setattr(accelerate_config, "default_config_file", str(tmp_path / "default_config.yaml"))

    def run():
        assert main(["env"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Let another version of hbat be installed, from a commit."""
    folder = tmp_path / "hbat_trl-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: hbat-trl\nVersion: 9.9\nRequires-Dist: trl>=1.0,<1.0.1\n"
        "Requires-Dist: torch>=2\nRequires-Dist: peft>=99; extra == 'peft'\nRequires-Dist: peft>=99; extra == 'dev'\n"
    )
    (folder / "direct_url.json").write_text('{"url": "https://a/b", "vcs_info": {"commit_id": "abc123"}}')
    monkeypatch.syspath_prepend(tmp_path)


def test_versions_and_devices_are_printed_one_a_line(lines):
    found = lines()
    assert f"- Python: {platform.python_version()}" in found
    for name in ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "safetensors"):
        assert f"- {name}: {metadata.version(name)}" in found
    assert "- liger-kernel: not installed" in found
    assert any(line.startswith("- CPU: ") and line.endswith(" GB") for line in found)
    assert any(line.startswith("- torch built for: ") for line in found)
    assert "- accelerate's default configuration: none" in found


@pytest.mark.usefixtures("installed")
def test_a_version_outside_of_what_hbat_requires_is_marked_and_a_commit_is_named(lines):
    found = lines()
    assert "- hbat-trl: 9.9 (commit abc123)" in found
    trl, peft = metadata.version("trl"), metadata.version("peft")
    assert f"- peft: {peft} (hbat requires >=99)" in found
    assert f"- trl: {trl}{' (hbat requires <1.0.1,>=1.0)' if trl != '1.0.0' else ''}" in found
    assert f"- torch: {metadata.version('torch')}" in found


def test_a_device_has_its_name_its_memory_and_whether_it_computes_in_bfloat16(lines, monkeypatch):
    gpu = types.SimpleNamespace(
        get_device_properties=lambda index: types.SimpleNamespace(name=f"GPU {index}", total_memory=16e9),
        is_bf16_supported=lambda including_emulation: including_emulation,
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: gpu)
    found = lines()
    assert "- device 1: GPU 1, 16.0 GB, no bf16" in found
    assert any(line.endswith("devices found: 2") for line in found)


def test_what_is_broken_is_named_and_the_rest_is_printed(lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = lines()
    assert any(line.startswith("- devices: ModuleNotFoundError: ") for line in found)
    assert "- environment variables:" in found


def test_settings_are_printed_and_tokens_and_paths_are_not(lines, tmp_path, monkeypatch):
    shown = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "0,1", "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:128", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    hidden = {
        "HF_TOKEN": "short", "HF_HOME": "/home/somebody", "HF_ENDPOINT": "https://user:word@host",
        "ACCELERATE_OTHER": "hf_abcdefghijKLMNOPQRST", "TRL_API_KEY": "12", "NCCL_PASSWORD": "12",
    }  # fmt: skip
    for name, value in (shown | hidden).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOMETHING_ELSE", "of no interest")
    (tmp_path / "default_config.yaml").write_text(
        "distributed_type: FSDP\nmixed_precision: bf16\nfsdp_config: {fsdp_version: 2}\nmain_training_function: main\n"
        "deepspeed_config: {deepspeed_config_file: /home/somebody/ds.json}\n"
    )
    found = lines()
    for name, value in {**shown, "fsdp_config.fsdp_version": "2", "distributed_type": "FSDP"}.items():
        assert f"  - {name}: {value}" in found
    for name in (*hidden, "deepspeed_config.deepspeed_config_file"):
        assert f"  - {name}: (set, not shown)" in found
    assert not {"short", "12"} & set(" ".join(found).split())
    assert not [line for line in found if "somebody" in line or "SOMETHING" in line or "abcdefghij" in line]


def test_an_option_that_it_does_not_have_is_refused(capsys):
    assert main(["env", "--num_rounds", "2"]) == 2
    assert "`--num_rounds` is not an option. See `hbat env --help`." in capsys.readouterr().err
