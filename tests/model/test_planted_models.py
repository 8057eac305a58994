"""Whatever lies in a model's folder runs no code unless that is asked for."""

import json
import sys

import cases
import malice
import pytest
import run_files
import runs
import torch
from transformers import dynamic_module_utils

from hbat.config.hbat import HBATConfig
from hbat.model.load import load_model
from hbat.model.merge import merge
from hbat.ppo.networks.policy_and_critic import build_critic
from hbat.ppo.rewards.model import load_reward_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]

FORMS = ("pickle", "torch")
REFUSED = "(UnpicklingError|OSError)"  # the latter from transformers 4.57


@pytest.fixture
def marker(tmp_path):
    """A file that is there if code of a planted file has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def model_folder(tmp_path):
    return run_files.save_model(tmp_path / "model")


def load(folder, **options):
    return load_model(str(folder), HBATConfig(output_dir="unused", **options))


#: Everything that a run loads by name or path, with the option that names it.
LOADERS = {
    "model": load,
    "reward_funcs": load_reward_model,
    "critic_model_name_or_path": lambda folder: build_critic("separate", cases.tiny_llama(), str(folder)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("called", LOADERS)
def test_a_planted_pytorch_model_is_refused_with_the_models_name(called, form, model_folder, marker):
    (model_folder / "model.safetensors").unlink()
    malice.plant(model_folder / "pytorch_model.bin", marker, form)
    with pytest.raises(ValueError, match=rf"^`{called}` '.*model': its weights cannot be loaded \({REFUSED}"):
        LOADERS[called](model_folder)
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt"])
def test_safetensors_are_read_and_what_lies_beside_them_is_not(name, form, model_folder, marker):
    malice.plant(model_folder / name, marker, form)
    assert runs.same(cases.weights(load(model_folder)), cases.weights(cases.tiny_llama()))
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_planted_safetensors_of_a_model_are_refused(form, model_folder, marker):
    malice.plant(model_folder / "model.safetensors", marker, form)
    with pytest.raises(ValueError, match=r"its weights cannot be loaded \(SafetensorError"):
        load(model_folder)
    assert not marker.exists()


def test_weights_that_are_nothing_but_tensors_may_be_a_pytorch_file(model_folder):
    (model_folder / "model.safetensors").unlink()
    torch.save(cases.tiny_llama().state_dict(), model_folder / "pytorch_model.bin")
    assert runs.same(cases.weights(load(model_folder)), cases.weights(cases.tiny_llama()))


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_adapter_is_refused(form, model_folder, tmp_path, marker):
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    cases.lora_llama().save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model_folder)}))
    (folder / "adapter_model.safetensors").unlink()
    malice.plant(folder / "adapter_model.bin", marker, form)
    with pytest.raises(ValueError, match=rf"its weights cannot be loaded \({REFUSED}"):
        load(folder)
    assert not marker.exists()


CUSTOM_CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "of-its-own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")


@pytest.fixture
def model_with_code(model_folder, marker):
    """A model whose configuration names classes in a file beside it."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "of-its-own",
        "auto_map": {"AutoConfig": "code.Config"} | dict.fromkeys(AUTO_CLASSES, "code.Model"),
    }
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model_folder / "code.py").write_text(CUSTOM_CODE.format(marker=str(marker)), encoding="utf-8")
    return model_folder


@pytest.mark.parametrize("called", LOADERS)
def test_code_beside_a_model_does_not_run(called, model_with_code, marker, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks at the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        LOADERS[called](model_with_code)
    assert not marker.exists()


def test_code_beside_a_model_runs_where_that_is_asked_for(model_with_code, marker, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    load(model_with_code, model_init_kwargs={"trust_remote_code": True})
    assert marker.exists()


def test_code_beside_the_base_of_an_adapter_runs_only_where_that_is_asked_for(
    model_with_code, marker, tmp_path, monkeypatch
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    cases.lora_llama().save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(model_with_code)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not marker.exists()
    asked = HBATConfig(output_dir="unused", model_init_kwargs={"trust_remote_code": True})
    assert merge(tmp_path / "adapter", tmp_path / "merged", config=asked).difference < 1e-5
    assert marker.exists()


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path, model_folder):
    return run_files.write(tmp_path, model_folder)


def test_the_command_line_refuses_a_planted_model_in_one_line(run_file, model_folder, tmp_path, marker, capfd):
    (model_folder / "model.safetensors").unlink()
    malice.plant(model_folder / "pytorch_model.bin", marker, "torch")
    status, lines = run_files.train(run_file, capfd)
    assert (status, len(lines)) == (2, 1)
    assert "its weights cannot be loaded" in lines[0]
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_no_code_beside_a_model(run_file, model_with_code, marker, tmp_path, capfd):
    status, lines = run_files.train(run_file, capfd)
    assert (status, len(lines)) == (2, 1)
    assert "`model_name_or_path`" in lines[0]
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
