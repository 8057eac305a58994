"""Nothing leads out of the run's folder, YAML is plain values, nothing goes to the network, no secret is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import run_files
import runs
import yaml
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from hbat.cli.yaml import PlainYAMLError, load_yaml, read_yaml
from hbat.objectives.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")


# --- paths -----------------------------------------------------------------------------------------------------------


NAMES = ["../evil", "a/b", "/abs", "..", ".", "", "a b", "a\\b", "ä", "a\n", "a\0b", "-x", "1st", "x" * 51, None, 3]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_objective_whose_name_is_unsafe_in_a_file_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^`Objective\(name=.*file names"):
        Objective(name=name, trainer_class=SFTTrainer, config_class=SFTConfig)


@pytest.mark.parametrize("name", ["sft", "code", "my-task_2", "K" * 50])
def test_an_objective_with_a_plain_name_is_taken(name):
    assert Objective(name=name, trainer_class=SFTTrainer, config_class=SFTConfig).name == name


def test_a_run_writes_nowhere_but_into_its_folder(tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    cases.tiny_llama().save_pretrained(home / "base")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    runs.train("~/base", "~/out", num_rounds=1, run_name="../../elsewhere", report_to="tensorboard")
    assert not list(work.iterdir())
    assert {path.name for path in home.iterdir()} == {"base", "out"}
    assert (home / "out" / "hbat_state.json").is_file()


@pytest.mark.parametrize("key", ["output_dir", "run_name", "report_to", "push_to_hub"])
def test_a_section_cannot_send_its_files_elsewhere(key, tmp_path):
    with pytest.raises(ValueError, match=rf"^`sft\.{key}` cannot be set here"):
        runs.build_run(cases.tiny_llama(), tmp_path / "out", sft={key: "../../elsewhere"})
    assert not (tmp_path / "out").exists()


# --- YAML ------------------------------------------------------------------------------------------------------------


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("!!python/object/apply:os.system ['touch marker']", "`!!python/object/apply:os.system` is not a plain value"),
        ("a: !!python/name:os.system", "is not a plain value, line 1 column 4"),
        ("a: !!binary aGVsbG8=", "`!!binary` is not a plain value"),
        ("a: !!set {x}", "`!!set` is not a plain value"),
        ("a: !mine 3", "`!mine` is not a plain value"),
        (BOMB, "its aliases expand to more than 10000 values"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}"), "its aliases expand to more than 10000 values"),
        ("a: &a [*a]", "a value contains itself"),
        ("&a {b: {c: *a}}", "a value contains itself"),
        ("[" * 2000, "it is nested too deeply"),
        ("a: {b: 1, b: 2}", "duplicate key `b`, line 1 column 11"),
        ("{a: 1, 'a': 2}", "duplicate key `a`"),
        ("? [a]\n: b", "unhashable key"),
        ("9" * 5000, "Exceeds the limit"),
    ],
    ids=lambda each: each[:20],
)
def test_yaml_that_is_more_than_plain_values_is_refused_in_one_line(text, problem):
    with pytest.raises(PlainYAMLError) as caught:
        load_yaml(text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_alias_that_stands_for_little_is_taken():
    assert load_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_a_bomb_in_a_file_is_refused_with_the_files_name(tmp_path):
    (tmp_path / "run.yaml").write_text(BOMB, encoding="utf-8")
    with pytest.raises(PlainYAMLError, match=r"run\.yaml is not valid YAML: its aliases"):
        read_yaml(tmp_path / "run.yaml")


# --- network and secrets ---------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path):
    return run_files.save_model(tmp_path / "model")


@pytest.fixture
def run_file(tmp_path, model_folder):
    return run_files.write(tmp_path, model_folder)


#: Every way out of this machine raises and is noted; the interpreter itself reports them.
PROGRAM = """
import importlib, json, pkgutil, socket, sys
asked = []
def watch(event, args):
    if event in {"socket.connect", "socket.sendto"} and args[0].family != socket.AF_UNIX:
        asked.append(str(args[1]))
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"} and args[0] not in {None, "localhost", "127.0.0.1"}:
        asked.append(args[0])
    else:
        return
    raise OSError("no network here")
sys.addaudithook(watch)
import hbat
for each in pkgutil.walk_packages(hbat.__path__, "hbat."):
    # The latter two import what TRL 1.13 has not any more, and 1.12 not yet.
    if not each.name.endswith(("__main__", "trl_ppo.trainer", "distillation")):
        importlib.import_module(each.name)
from hbat.cli.main import main
assert main(["train", "--config", sys.argv[1]]) == 0
try:
    socket.getaddrinfo("example.org", 80)
except OSError:
    print(json.dumps(asked))
"""


def test_import_construction_and_training_ask_for_no_network_though_they_might(run_file, tmp_path):
    """TRL's own ping is switched off by `HF_HUB_DISABLE_TELEMETRY`, which the README names."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    assert environment["HF_HUB_DISABLE_TELEMETRY"]
    command = [sys.executable, "-c", PROGRAM, str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["example.org"]
    assert (tmp_path / "out" / "README.md").exists()


SECRET = "s3cr3t-of-the-environment"  # noqa: S105 - no real one


def test_what_a_run_leaves_holds_no_secrets_and_its_card_and_results_no_paths(run_file, tmp_path, monkeypatch, capfd):
    values = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    values["env"] = {"HBAT_TEST_SECRET": SECRET}
    values["model_init_kwargs"] = {"token": SECRET}
    values["sft"]["hub_token"] = SECRET
    values["eval_datasets"] = {"sft": {"path": values["datasets"]["sft"], "split": "train[:2]"}}
    run_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("HBAT_TEST_SECRET", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert run_files.train(run_file, capfd) == (0, [])
    files = [each for each in (tmp_path / "out").rglob("*") if each.is_file()]
    assert not [each for each in files if SECRET.encode() in each.read_bytes()]
    for name in ("README.md", "evaluation.json", "config.json", "trainer_state.json"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text, name
        assert str(Path.home()) not in text, name
    assert "Trained from `model`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert load_file(tmp_path / "out" / "model.safetensors")
