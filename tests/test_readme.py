import ast
import dataclasses
import pathlib
import re

import pytest
import torch

import hbat
from hbat.config.ewc import EWCConfig
from hbat.config.hbat import HBATConfig

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_program_in_the_readme_is_python_and_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "hbat":
            assert all(hasattr(hbat, each.name) for each in node.names)


def test_the_plain_torch_loop_of_the_readme_learns_and_is_held_back():
    (loop,) = (each for each in BLOCKS if "torch.optim.SGD" in each)
    torch.manual_seed(0)
    held = {}
    exec(compile(loop, "README.md", "exec"), held)  # noqa: S102 - the program that the README shows
    torch.manual_seed(0)
    free = {}
    exec(compile(loop.replace("0.5 *", "0.0 *"), "README.md", "exec"), free)  # noqa: S102
    assert free["loss"].item() < held["loss"].item() < 4.0


def test_the_options_in_the_readme_exist_with_the_defaults_that_it_names():
    fields = {each.name: each for each in dataclasses.fields(HBATConfig)}
    fields |= {f"ewc.{each.name}": each for each in dataclasses.fields(EWCConfig)}
    rows = re.findall(r"^\| `([\w.]+)` \| `?([\w.]+)`?", README, flags=re.MULTILINE)
    assert len(rows) >= 10
    for name, default in rows:
        expected = fields[name].default
        assert default == {None: "none"}.get(expected, str(expected).removesuffix(".0") if expected != 1.0 else "1.0")


def test_the_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"\bmake ([a-z-]+)\b", "\n".join(re.findall(r"```bash\n(.*?)```", README + contributing, re.DOTALL))
        )
    )
    assert named
    assert named <= targets
