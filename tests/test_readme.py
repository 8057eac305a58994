"""What README and docs/ say is true: programs run, options and links exist, generated pages are current."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import cases
import datasets
import pytest
import runs
import scorers
import torch
import trl
import yaml
from configuration import PAGE, page
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import hbat
import hbat.ewc
from hbat.cli.demo.results import Outcome, Point, verdict
from hbat.cli.demo.scoring import Scores
from hbat.cli.eval_file import EvalFile
from hbat.cli.run_file import from_values
from hbat.cli.yaml import load_yaml
from hbat.config.chain import name_of, named
from hbat.config.ewc import EWCConfig
from hbat.config.fields import build_section
from hbat.model.adapters import refuse_adapters

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/hbat-trl/hbat/blob/main/"
IMAGES = "https://raw.githubusercontent.com/hbat-trl/hbat/main/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = {f"docs/{file.name}": file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING} | PAGES
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def program(name, holding):
    (found,) = (block for block in blocks("python", TEXTS[name]) if holding in block)
    return found


def run(text, names=None):
    names = {} if names is None else names
    exec(compile(text, "documentation", "exec"), names)  # noqa: S102 - programs that the documentation shows
    return names


# --- programs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder with tiny models under the names that the programs take from the Hub, and few rows."""
    policy = cases.tiny_llama()
    policy.config.max_position_embeddings = 1024  # for completions of the default length
    reward = scorers.tiny_scorer(vocabulary=cases.VOCABULARY_SIZE)
    for name, model in {"Qwen/Qwen3-0.6B": policy, "merged": policy, "qwen3-reward": reward}.items():
        model.save_pretrained(tmp_path / name)
        cases.tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = {"trl-lib/tldr": cases.sft_rows(8), "trl-lib/tldr-preference": cases.preference_rows(8)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[name])
    monkeypatch.chdir(tmp_path)


#: What takes long in the programs, and what takes its place.
SMALL = {
    "rollout_batch_size=256, per_device_train_batch_size=32": "max_steps=2, max_completion_length=8",
    "[0, 0.25, 0.5, 0.75, 1]": "[0, 1]",
}


def small(text):
    """The program on a CPU, in a short time."""
    for long, short in SMALL.items():
        text = text.replace(long, short)
    return text if "use_cpu" in text else text.replace("output_dir=", "use_cpu=True, output_dir=")


@pytest.mark.filterwarnings("default")  # about options that the programs leave at their defaults
@pytest.mark.parametrize("name", [name for name in PAGES if blocks("python", PAGES[name])])
def test_the_programs_of_a_page_run_in_turn_and_do_what_they_show(name, hub, capsys):
    names = {}
    for block in blocks("python", PAGES[name]):
        capsys.readouterr()
        shown = re.findall(r"^# (.*)$", block, flags=re.MULTILINE)
        errors = tuple(each for each in (ValueError, hbat.RunStateError) if each.__name__ in shown)
        with pytest.raises(errors) if errors else contextlib.nullcontext():
            run(small(block), names)
        assert errors or not shown or capsys.readouterr().out.splitlines() == shown


@pytest.mark.filterwarnings("default")
def test_the_program_of_the_readme_trains_and_saves_an_adapter(hub):
    text = program("README.md", "HBATTrainer")
    assert len(text.splitlines()) <= 21
    trainer = run(small(text))["trainer"]
    assert {entry.split("/")[0] for log in trainer.state.log_history for entry in log} >= {"sft", "dpo"}
    assert Path("qwen3-hbat", "adapter_model.safetensors").exists()


def test_the_plain_torch_loop_learns_and_is_held_back():
    loop = program("docs/ewc.md", "torch.optim.SGD")
    torch.manual_seed(0)
    held = run(loop)
    torch.manual_seed(0)
    free = run(loop.replace("0.5 *", "0.0 *"))
    assert free["loss"].item() < held["loss"].item() < 4.0


def test_the_program_of_two_trainers_changes_the_weights(tmp_path):
    model = cases.tiny_llama()
    before = cases.weights(model)
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", **runs.section())
    run(program("docs/ewc.md", "EWCCallback"))["train_both"](
        model, cases.sft_rows(4, 1), cases.sft_rows(4, 2), args=args, processing_class=cases.tiny_tokenizer()
    )
    assert not runs.same(before, cases.weights(model))


def test_the_adapter_that_is_split_off_the_base_is_loaded_as_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.tiny_llama().save_pretrained("model")
    run(program("docs/adapters.md", "def split").replace("Qwen/Qwen3-0.6B", "model"))
    model = AutoPeftModelForCausalLM.from_pretrained("adapter", is_trainable=True)
    refuse_adapters(model, takes_reference=True)
    ids = torch.arange(8)[None]
    assert torch.allclose(model(ids).logits, cases.tiny_llama()(ids).logits, atol=1e-5)
    rest = AutoModelForCausalLM.from_pretrained("rest")
    assert not torch.allclose(rest(ids).logits, cases.tiny_llama()(ids).logits, atol=1e-2)


# --- options, versions, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_option_that_is_named_exists(name):
    for block in blocks("yaml", TEXTS[name]):
        values = load_yaml(block)
        if block.startswith("# eval.yaml"):
            build_section("", EvalFile, values)
            continue
        data = {name_of(entry): "rows.jsonl" for entry in named(values.get("objectives", ["sft", "dpo"]))}
        given = values | {"datasets": data | values.get("datasets", {})}
        from_values({"model_name_or_path": "model", "output_dir": "run"} | given, name)
    consolidation = {field.name for field in dataclasses.fields(EWCConfig)}
    assert set(re.findall(r"`ewc\.(\w+)", TEXTS[name])) <= consolidation


def test_the_page_of_options_is_written_from_the_help_texts():
    written, expected = PAGE.read_text(encoding="utf-8"), page()  # the order of fields is that of transformers
    assert sorted(written.splitlines()) == sorted(expected.splitlines()), "Run `python docs/configuration.py`."


def test_the_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for name, text in TEXTS.items():
        shown = "\n".join([*blocks("bash", text), *re.findall(r"`(make .*?)`", text)])
        assert set(re.findall(r"\bmake ([a-z-]+)\b", shown)) <= targets, name


def test_the_versions_that_are_named_are_those_that_are_tested():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\w+)==(\d+\.\d+)", constraints, flags=re.MULTILINE))
    oldest = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    for library, lower, upper in re.findall(r"(TRL|transformers) ([\d.]+) to ([\d.]+\d)", PAGES["docs/limits.md"]):
        assert upper == pins[library.lower()]
        assert f"{library.lower()}=={lower}." in oldest
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


# --- where things are ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_lists_every_wing():
    assert len(README.splitlines()) <= 150
    source = ROOT / "src" / "hbat"
    wings = {folder.parent.name for folder in source.glob("*/__init__.py")} | {"trainer"}
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == sorted(wings)


def test_links_of_the_readme_are_absolute_and_lead_to_files():
    targets = re.findall(r"\]\((.*?)\)", README)
    assert all(target.startswith("https://") for target in targets)
    own = [re.sub(f"^({REPOSITORY}|{IMAGES})", "", target) for target in targets if "hbat-trl/hbat/" in target]
    assert len(own) > 10
    assert [name for name in own if not (ROOT / name).is_file()] == []


def test_links_between_pages_lead_to_files():
    for name, text in PAGES.items():
        targets = [target.partition("#")[0] for target in re.findall(r"\]\((?!https:)(.*?)\)", text)]
        assert [target for target in targets if target and not (ROOT / "docs" / target).is_file()] == [], name


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/index.md"]))
    assert listed == {Path(name).name for name in PAGES} - {"index.md"}


def test_the_api_page_lists_every_public_name():
    listed = set(re.findall(r"^\.\. auto\w+:: hbat\.([\w.]+)", PAGES["docs/api.md"], flags=re.MULTILINE))
    assert listed == set(hbat.__all__) - {"__version__"} | {f"ewc.{name}" for name in hbat.ewc.__all__}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_its_search_finds_options(tmp_path):
    pytest.importorskip("furo", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "docs", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert '"end_weight":' in (tmp_path / "searchindex.js").read_text(encoding="utf-8")


# --- numbers ---------------------------------------------------------------------------------------------------------


def demo(seed):
    """Outcomes of a committed result of `hbat demo`."""
    read = json.loads((ROOT / "docs" / "results" / f"demo-{seed}.json").read_text(encoding="utf-8"))
    return [
        Outcome(
            method["name"],
            [
                [Point(at["end_weight"], Scores(**at["greedy"]), Scores(**at["sampled"])) for at in points]
                for points in method["runs"]
            ],
        )
        for method in read["methods"]
    ]


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_numbers_of_the_demo_are_those_of_its_committed_results(seed):
    said = verdict(demo(seed))
    gap, low, high = re.search(r"([+-][\d.]+) points, 95 % interval \[([+-][\d.]+), ([+-][\d.]+)\]", said).groups()
    ours, theirs = re.findall(r"([\d.]+) %", said)[:2]
    for text in (README, PAGES["docs/does-it-work.md"]):
        assert f"{gap} points" in text or f"{gap} [" in text
        assert f"[{low}, {high}]" in " ".join(text.split())
    assert f"{float(ours):.0f}" in README
    assert f"{ours} against {theirs}" in " ".join(PAGES["docs/does-it-work.md"].split())
    assert f"**{ours}**" in PAGES["docs/does-it-work.md"] or seed > 0


def test_the_tables_of_the_evidence_are_those_of_its_committed_records(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "alignment")
    read, tables = import_module("report").read, import_module("tables").tables
    made = dict(tables([
        record
        for record in read(ROOT / "docs" / "results" / "evidence")
        if record["family"] not in {"score_every", "temperatures"}
    ]))  # fmt: skip
    assert "Main table" in made
    assert [name for name, table in made.items() if table not in PAGES["docs/does-it-work.md"]] == []
    rows = [line.strip("| ").split(" | ") for line in made["Tasks in two parts"].splitlines()]
    kept = {cells[0]: int(cells[-1].split(" / ")[0]) for cells in rows if re.fullmatch(r"\d+ / \d+", cells[-1])}
    plain = max(share for name, share in kept.items() if name.startswith("two-stage"))
    assert f"{kept['**HBAT** (`path`, strength 0.5), end, no old rows']} %" in README
    assert f"{plain} % at most" in README


def test_the_table_of_real_text_is_that_of_its_committed_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "alignment")
    script = import_module("real_text")
    records = script.read(ROOT / "docs" / "results" / "real_text")
    made = script.table(records).splitlines()
    section = PAGES["docs/does-it-work.md"].partition("## A real language model")[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 8
    assert [line for line in shown if line not in made] == []
    factors = [
        record["lora_A"] for record in script.read(ROOT / "docs" / "results" / "real_text") if "lora_A" in record
    ]
    said = " ".join(PAGES["docs/method.md"].split())
    for name in factors[0]:
        low, high = (f"{100 * end(each[name] for each in factors):.0f}" for end in (min, max))
        assert f"{low} %" in said if low == high else f"{low} to {high} %" in said, name


def test_the_table_of_an_evaluation_is_that_of_its_committed_run():
    rows = json.loads((ROOT / "docs" / "results" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        texts, pairs, rouge, completions = (row["scores"][name] for name in ("texts", "pairs", "rouge", "completions"))
        cells = [
            "start" if row["objective"] is None else row["objective"].upper(),
            "{rougeL:.3f} [{rougeL_low:.3f}, {rougeL_high:.3f}]".format(**rouge),
            "{ended:.0%}".format(**completions).replace("%", " %"),
            "{tokens:.1f}".format(**completions),
            "{repetition:.3f}".format(**completions),
            "{accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**pairs),
            "{loss:.3f} [{loss_low:.2f}, {loss_high:.2f}]".format(**texts),
        ]
        assert f"| {' | '.join(cells)} |" in PAGES["docs/evaluation.md"]
