"""Every YAML file of the examples is read as for users, and trains with stand-ins for model and data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import judge_server
import pytest
import yaml

from hbat.cli.build import check_sections, peft_config, quantization_config
from hbat.cli.main import main
from hbat.cli.run_file import parse

ROOT = Path(__file__).resolve().parents[2]
#: Of `trl reward`, which `test_scripts.py` trains with.
OF_TRL = {"reward_cpu"}
FILES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
EVALUATIONS = [file for file in FILES if file.stem.endswith("_eval")]
CONFIGS = [file for file in FILES if file.stem not in OF_TRL and file not in EVALUATIONS]
LAUNCHERS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
#: What trains and launches in `make test`.
QUICK = {"summarisation_05b_lora", "ddp"}

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, about defaults that the files keep


def message(role, text):
    return {"role": role, "content": text}


def rows_like(name, number):
    """A row with the columns and the form of a data set on the Hub."""
    asked, good, bad = f"Say {number}, please.", f" It is {number}.", f" No, not {number + 1}."
    turns = [message("user", asked), message("assistant", good)]
    return {
        "trl-lib/tldr": {"prompt": asked, "completion": good},
        "trl-lib/tldr-preference": {"prompt": asked, "chosen": good, "rejected": bad},
        "trl-lib/Capybara": {"source": "x", "messages": 2 * turns, "num_turns": 2},
        "trl-lib/hh-rlhf-helpful-base": {
            "prompt": turns[:1], "chosen": turns[1:], "rejected": [message("assistant", bad)]
        },
    }[name]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    # bitsandbytes on a CPU with AVX512-BF16 needs rows of at least a block of 64 weights.
    cases.tiny_llama(tied=True, hidden=64).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    from transformers import LlamaForSequenceClassification

    folder, config = tmp_path_factory.mktemp("reward"), cases.tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


def stand_in(source, folder):
    """A file in the place of a data set of the Hub."""
    name = source["path"] if isinstance(source, dict) else source
    file = folder / f"{name.replace('/', '-')}.jsonl"
    file.write_text("".join(json.dumps(rows_like(name, number)) + "\n" for number in range(8)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_key_is_known_to_hbat_trl_or_peft(file):
    if "load_in" in file.read_text(encoding="utf-8"):
        pytest.importorskip("bitsandbytes")
    names = parse(file).config.objective_names
    run = parse(file, [(f"{name}.use_cpu", True) for name in names])
    sections = check_sections(run)
    assert [*sections] == names
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert (peft_config(run) is None) == ("peft" not in written)
    assert (quantization_config(run) is None) == ("quantization" not in written)
    for name, section in sections.items():
        assert section.learning_rate == pytest.approx(float(written[name]["learning_rate"]))


def by_name(files):
    return [pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else pytest.mark.slow) for file in files]


#: The others, for the CPU, take local files; one of them runs in test_scripts.py.
HUB = [file for file in CONFIGS if "trl-lib/" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", by_name(HUB))
def test_a_file_for_data_of_the_hub_trains_a_step_of_every_objective(file, model, reward_model, tmp_path):
    run = parse(file)
    if run.quantization is not None:
        pytest.importorskip("bitsandbytes")
    options = {
        "model_name_or_path": model,
        "output_dir": tmp_path / "run",
        "num_rounds": 1,
        "datasets": {name: stand_in(source, tmp_path) for name, source in run.datasets.items()},
    }
    if run.eval_datasets:
        options["eval_datasets"] = {name: stand_in(source, tmp_path) for name, source in run.eval_datasets.items()}
    if run.reward_funcs:
        options["reward_funcs"] = reward_model
    for name in run.config.objective_names:
        options |= {f"{name}.use_cpu": "true", f"{name}.max_steps": 1, f"{name}.gradient_accumulation_steps": 1}
    if "ppo" in run.config.objective_names:
        options |= {"ppo.rollout_batch_size": 8, "ppo.max_completion_length": 4}
    words = [word for key, value in options.items() for word in (f"--{key}", _yaml(value))]
    assert main(["train", "--config", str(file), *words]) == 0
    stages = json.loads((tmp_path / "run" / "hbat_state.json").read_text(encoding="utf-8"))
    assert stages["next_stage"] == len(run.config.objective_names)
    saved = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert saved == {"adapter_model.safetensors" if run.peft else "model.safetensors"}


@pytest.mark.parametrize("file", EVALUATIONS, ids=lambda file: file.stem)
def test_a_file_of_an_evaluation_measures_with_a_judge(file, model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", judge_server.KEY)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    options = {key: stand_in(written[key], tmp_path) for key in ("prompts", "pairs")}
    options |= {"output_dir": tmp_path / "out", "max_new_tokens": 4, "limit": 2, "temperatures": "[0,1]", "samples": 2}
    with judge_server.judge() as server:
        options["judge.base_url"] = server.url
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        assert main(["eval", str(model), "--config", str(file), *words]) == 0
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"][model.name]
    kinds = [f"{name}@{temperature}" for temperature in (0, 1) for name in ("completions", "rouge", "win_rate")]
    assert set(scores) == {*kinds, "pairs"}
    assert scores["win_rate@1"]["pairs"] == 4


def _yaml(value):
    return json.dumps(value) if isinstance(value, dict) else str(value)


# --- accelerate ------------------------------------------------------------------------------------------------------

#: Writes what `accelerate launch` tells the process that runs it.
SEEN = """
import json, os, pathlib
rank = os.environ.get("RANK", "0")
pathlib.Path(__file__).with_name(f"seen-{rank}.json").write_text(json.dumps(dict(os.environ)))
"""
EXPECTED = {
    "single_gpu": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "ddp": {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "WORLD_SIZE": "2"},
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "WORLD_SIZE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_MIXED_PRECISION": "bf16",
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_MIXED_PRECISION": "no",
    },
}  # fmt: skip


@pytest.mark.parametrize("file", by_name(LAUNCHERS))
def test_accelerate_starts_the_processes_that_a_launch_configuration_names(file, tmp_path):
    if file.stem.startswith("zero"):
        pytest.importorskip("deepspeed", reason="accelerate looks for it")
    script = tmp_path / "seen.py"
    script.write_text(SEEN, encoding="utf-8")
    count = int(EXPECTED[file.stem].get("WORLD_SIZE", 1))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "FSDP"))}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = subprocess.run(
        [*launch, *(["--num_processes", str(count)] if count > 1 else []), str(script)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("seen-*.json")]
    assert len(seen) == count
    for variables in seen:
        assert {key: variables.get(key) for key in EXPECTED[file.stem]} == EXPECTED[file.stem]
