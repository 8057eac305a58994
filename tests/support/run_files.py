"""A model's folder, rows and the YAML file of a small run on disk, and the command line on it."""

import json

import cases
import runs
import yaml

from hbat.cli.main import main


def save_model(folder, seed=0):
    cases.tiny_llama(seed).save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(file, rows):
    """Write rows as lines of JSON; returns the file's name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def write(folder, model, **section):
    """Write `run.yaml` and its data; one round of `sft` and `dpo` into the folder `out`."""
    cases.sft_rows(8, 3).to_json(folder / "sft.jsonl")
    cases.preference_rows(8, 3).to_json(folder / "dpo.jsonl")
    values = {
        "model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "num_rounds": 1,
        "disable_tqdm": True,
        "datasets": {"sft": str(folder / "sft.jsonl"), "dpo": str(folder / "dpo.jsonl")},
        "sft": runs.section(**section),
        "dpo": runs.section(**section),
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def train(file, capfd, *words):
    """Run `hbat train`; returns its status and its error lines."""
    capfd.readouterr()
    status = main(["train", "--config", str(file), *words])
    return status, [line for line in capfd.readouterr().err.splitlines() if line.startswith("hbat: ")]
