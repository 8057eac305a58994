"""The examples run, at toy size: a model from a text, a reward model from pairs, and runs of SFT and PPO on both."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from hbat.cli import main

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "scripts"
CONFIG = ROOT / "examples" / "configs" / "real_ppo_cpu.yaml"
WORDS = ("the", "garden", "is", "green", "and", "quiet", "today", "we", "walk", "there", "slowly")

pytestmark = pytest.mark.filterwarnings("default")  # of the host about options that the scripts leave at its defaults


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
    sft = [{"prompt": each, "completion": message("assistant", 3)} for each in asked]
    pairs = [
        {"prompt": each, "chosen": message("assistant", 6), "rejected": message("assistant", 2)} for each in asked
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
    with pytest.MonkeyPatch.context() as patch:
        run(
            "train_reward_model.py", patch,
            "--model", toys / "model", "--pairs", toys / "pairs.jsonl", "--batch_size", 8,
            "--output_dir", toys / "reward",
        )  # fmt: skip
    return toys / "reward"


def test_a_reward_model_can_begin_with_random_weights_and_learns_what_is_chosen(toys, tmp_path, monkeypatch, capsys):
    run(
        "train_reward_model.py", monkeypatch,
        "--tokenizer", toys / "model", "--hidden", 32, "--layers", 1, "--epochs", 20, "--learning_rate", 3e-3,
        "--pairs", toys / "pairs.jsonl", "--eval_pairs", toys / "pairs.jsonl", "--output_dir", tmp_path,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "pairs: the chosen side scores higher in 100.0 % of the held-out pairs" in printed
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("lora", [False, True])
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
