"""The example scripts run, at toy size: models from a text and from pairs, runs of SFT with DPO and PPO, EWC alone."""

import contextlib
import io
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from hbat.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "scripts"
CONFIG = ROOT / "examples" / "configs" / "real_ppo_cpu.yaml"
WORDS = ("the", "garden", "is", "green", "and", "quiet", "today", "we", "walk", "there", "slowly")

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, about defaults that the scripts keep
SLOW_LORA = pytest.param(True, marks=pytest.mark.slow)


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def sentence(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Files of rows, and the folder of a language model that `train_tiny_model.py` made of them."""
    folder, rng = tmp_path_factory.mktemp("toys"), random.Random(0)

    def message(role, count):
        return [{"role": role, "content": sentence(rng, count)}]

    asked = [message("user", 1 + number % 5) for number in range(16)]
    sft = [{"prompt": prompt, "completion": message("assistant", 3)} for prompt in asked]
    pairs = [
        {"prompt": prompt, "chosen": message("assistant", 6), "rejected": message("assistant", 2)} for prompt in asked
    ]
    (folder / "text.txt").write_text("\n".join(sentence(rng, 12) for _ in range(60)), encoding="utf-8")
    write(folder / "sft.jsonl", sft)
    write(folder / "pairs.jsonl", pairs)
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"vocabulary": 300, "hidden": 32, "layers": 1, "steps": 2, "batch_size": 2, "block": 16}
        run(
            "train_tiny_model.py", patch,
            "--text", folder / "text.txt", "--chats", folder / "sft.jsonl", "--output_dir", folder / "model",
            *(word for name, size in sizes.items() for word in (f"--{name}", size)),
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reward_model(toys):
    """The folder of a reward model that `trl reward` made by the example's configuration."""
    values = yaml.safe_load((ROOT / "examples" / "configs" / "reward_cpu.yaml").read_text(encoding="utf-8"))
    values["datasets"] = [{"path": "json", "data_files": str(toys / "pairs.jsonl")}]
    values |= {"model_name_or_path": str(toys / "model"), "output_dir": str(toys / "reward")}
    (toys / "reward.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["reward", "--config", str(toys / "reward.yaml")])
        runpy.run_module("trl.scripts.reward", run_name="__main__")
    assert "eval_accuracy" in printed.getvalue()
    return toys / "reward"


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_python_api_alternates_sft_and_ppo(lora, toys, reward_model, tmp_path, monkeypatch, capsys):
    rewards = [] if lora else ["--reward_model", reward_model]
    pytest.importorskip("peft")
    run(
        "hbat_ppo.py", monkeypatch,
        "--model", toys / "model", "--sft", toys / "sft.jsonl", "--prompts", toys / "pairs.jsonl", "--use_cpu",
        "--rollout", 8, "--batch_size", 4, "--completion_length", 6, "--output_dir", tmp_path,
        *(["--lora"] if lora else []), *rewards,
    )  # fmt: skip
    assert "Reward of sampled completions" in capsys.readouterr().out
    assert (tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()


def test_the_configuration_of_ppo_on_the_cpu_runs(toys, reward_model, tmp_path, capsys):
    rows = f"{{sft: {toys}/sft.jsonl, ppo: {toys}/pairs.jsonl}}"
    status = main([
        "train", "--config", str(CONFIG), "--model_name_or_path", str(toys / "model"), "--output_dir", str(tmp_path),
        "--reward_funcs", str(reward_model), "--datasets", rows, "--eval_datasets", rows, "--report_to", "none",
        "--ppo.rollout_batch_size", "8", "--ppo.per_device_train_batch_size", "4",
        "--ppo.max_completion_length", "6",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0
    assert "ppo reward" in printed
    assert "round 2: ppo" in printed
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["rows"]) == 5


@pytest.mark.parametrize("lora", [False, SLOW_LORA])
def test_the_python_api_alternates_sft_and_dpo(lora, toys, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    arguments = [
        "--model", toys / "model", "--sft", toys / "sft.jsonl", "--dpo", toys / "pairs.jsonl", "--use_cpu",
        "--held_out", 4, "--rounds", 1, "--output_dir", tmp_path, *(["--lora"] if lora else []),
    ]  # fmt: skip
    run("hbat_sft_dpo.py", monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[0] for line in lines] == ["start", "round 1: sft", "round 1: dpo"]
    assert "dpo loss 0.6931" in lines[0]
    assert (tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()


def test_qlora_trains_an_adapter_that_merges_into_the_unquantized_model(toys, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    run(
        "hbat_qlora_single_gpu.py", monkeypatch,
        "--model", toys / "model", "--sft", toys / "sft.jsonl", "--dpo", toys / "pairs.jsonl", "--use_cpu",
        "--rounds", 1, "--accumulate", 2, "--output_dir", tmp_path / "run", "--merge", tmp_path / "merged",
    )  # fmt: skip
    assert "Merged model in" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (toys / "model", tmp_path / "merged"))
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}


@pytest.mark.parametrize("lora", [False, SLOW_LORA])
def test_ewc_alone_holds_a_second_task_back_in_plain_trainers(lora, toys, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    second = tmp_path / "second.jsonl"
    rows = [json.loads(line) for line in (toys / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    write(second, [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    learned = {}
    for strength in (0, 1e4):
        run(
            "ewc_callback_only.py", monkeypatch,
            "--model", toys / "model", "--first", toys / "sft.jsonl", "--second", second, "--use_cpu",
            "--held_out", 4, "--batch_size", 2, "--strength", strength, "--output_dir", tmp_path / str(strength),
            *(["--lora"] if lora else []),
        )  # fmt: skip
        text = capsys.readouterr().out
        before, after = (float(loss) for loss in re.findall(r"loss of the second ([\d.]+)", text))
        learned[strength] = before - after
        assert (tmp_path / str(strength) / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    assert learned[0] > 2 * learned[1e4] > 0
