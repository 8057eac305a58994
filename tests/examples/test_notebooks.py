"""The notebooks hold no output and run from top to bottom, with stand-ins for model and data in their settings."""

import ast
import json
import re
from pathlib import Path

import cases
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, about options left at their defaults
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def code_cells(file):
    """Sources and tags of the code cells but the one that installs."""
    cells = [cell for cell in read(file)["cells"] if cell["cell_type"] == "code"]
    found = [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    return [(source, tags) for source, tags in found if "install" not in tags]


@each_notebook
def test_a_notebook_is_whole_and_holds_no_output(file):
    notebook = read(file)
    assert notebook["nbformat"] == 4
    assert notebook["nbformat_minor"] >= 5
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in {"code", "markdown"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@each_notebook
def test_a_notebook_has_one_cell_of_settings_that_are_plain_values(file):
    (source,) = [source for source, tags in code_cells(file) if "parameters" in tags]
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


def rows_like_tldr(folder):
    sft = [{"prompt": f"Count {number}:", "completion": f" {number + 1}"} for number in range(16)]
    dpo = [{"prompt": f"Count {n}:", "chosen": f" {n + 1}", "rejected": f" {n} again"} for n in range(16)]
    for name, rows in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    cases.tiny_llama(tied=True).save_pretrained("model")
    cases.tiny_tokenizer().save_pretrained("model")
    rows_like_tldr(tmp_path)
    settings = {
        "MODEL": "absent", "SFT_ROWS": 8, "DPO_ROWS": 8, "HELD_OUT": 4, "MAX_LENGTH": 64, "USE_CPU": True,
        "OUTPUT": "run", "CPU_MODEL": "model", "CPU_ROWS": 8, "CPU_HELD_OUT": 4, "CPU_MAX_LENGTH": 64,
        "SFT": {"path": "json", "data_files": "sft.jsonl", "split": "train"},
        "DPO": {"path": "json", "data_files": "dpo.jsonl", "split": "train"},
    }  # fmt: skip
    (file,) = [path for path in NOTEBOOKS if path.stem == "hbat_t4"]
    namespace = {}
    for source, tags in code_cells(file):
        exec(compile(source, file.name, "exec"), namespace)  # noqa: S102 - our own file
        if "parameters" in tags:
            assert settings.keys() == {name for name in namespace if name.isupper()}
            namespace.update(settings)
    printed = capsys.readouterr().out
    assert printed.count("round 1: dpo") == 2
    assert printed.count("dpo loss 0.6931") == 2
    assert printed.count("--- after dpo: Count") == 2  # each prompt once: both data sets have the same
    assert re.search(r"^\d+ \d\.\d+$", printed, re.MULTILINE)  # the penalty's ratio
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
