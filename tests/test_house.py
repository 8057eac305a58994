"""The rules of the house: which file may import what, how files are named, and what no file may hold."""

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import hbat

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "hbat"
FILES = {str(each.relative_to(SOURCE)): each for each in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(each.read_text(encoding="utf-8"), name) for name, each in FILES.items()}

#: The wings. A wing imports only from itself and from wings before it.
ORDER = [
    "config",
    "engines",
    "data",
    "ewc",
    "state",
    "model",
    "reports",
    "ppo",
    "evaluation",
    "objectives",
    "stages",
    "trainer",
    "cli",
]
#: What needs nothing but torch: the mathematics.
MATHEMATICS = {
    "ewc/fisher.py", "ewc/importance.py", "ewc/kernels.py", "ewc/parameters.py", "ewc/path.py", "ewc/penalty.py",
    "ppo/maths.py",
}  # fmt: skip

#: The front door imports from everywhere; it is checked on its own.
DOOR = "__init__.py"

each_file = pytest.mark.parametrize("name", FILES)
each_room = pytest.mark.parametrize("name", [name for name in FILES if name != DOOR])


def module_of(name):
    return "hbat." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


FILE_OF = {module_of(name): name for name in FILES if name != DOOR} | {"hbat": DOOR}


def imported(name):
    """Every module that a file imports anywhere, also inside functions and for type checkers only."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"src/hbat/{name} line {node.lineno}: write the import in full, from hbat..."
            inner = [f"{node.module}.{each.name}" for each in node.names]
            yield from ([each for each in inner if each in FILE_OF] or [node.module])


def own(name):
    return {FILE_OF[each] for each in imported(name) if each in FILE_OF}


# --- who imports whom ------------------------------------------------------------------------------------------------


def wing(name):
    return name.split("/")[0].removesuffix(".py")


@each_room
def test_a_file_imports_only_from_its_own_wing_or_one_before_it(name):
    if name == "__main__.py":
        return
    wrong = [each for each in own(name) - {DOOR} if ORDER.index(wing(each)) > ORDER.index(wing(name))]
    assert not wrong, (
        f"src/hbat/{name} imports {wrong}, from later wings: {' < '.join(ORDER)}. Move what it needs "
        "to an earlier wing, or the file to a later one."
    )


def test_the_mathematics_needs_nothing_but_torch():
    for name in MATHEMATICS:
        packages = {each.split(".")[0] for each in imported(name)} - set(sys.stdlib_module_names) - {"hbat"}
        assert packages <= {"torch"}, f"src/hbat/{name} imports {sorted(packages)}."


#: Who names an engine beside the engines: keys of TRL's arguments, what wrappers leave in names of parameters, what an
#: objective was tested with, what PPO shards, and the versions in a bug report.
NAMES_ENGINES = {
    "cli/env.py", "config/fields.py", "ewc/parameters.py", "objectives/built_in.py", "objectives/objective.py",
    "ppo/engine.py",
}  # fmt: skip


def test_only_the_engines_wing_names_an_engine():
    found = {
        name for name, path in FILES.items() if re.search(r"fsdp|deepspeed", path.read_text("utf-8"), re.IGNORECASE)
    }
    assert {name for name in found if wing(name) != "engines"} == NAMES_ENGINES


@each_room
def test_every_patch_on_a_trainer_stands_in_one_file(name):
    assigned = [
        (node.lineno, ast.unparse(target))
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Assign) and ast.unparse(node.value) != "None"
        for target in node.targets
    ]
    found = [(line, target) for line, target in assigned if re.search(r"(trainer|accelerator|sampler)\.\w+$", target)]
    assert not found, f"src/hbat/{name} patches {found}: that belongs into engines/patches.py, with its undo."


def test_only_the_faces_come_in_by_the_front_door():
    through_door = {name for name in FILES if DOOR in own(name)}
    assert through_door <= {"cli/main.py", "cli/options.py"}  # errors, the version


def test_nothing_imports_in_a_circle():
    state = {}

    def visit(name, path):
        if state.get(name) == "done" or name == DOOR:
            return
        assert state.get(name) != "open", f"these files import each other: {' -> '.join([*path, name])}"
        state[name] = "open"
        for each in sorted(own(name)):
            visit(each, [*path, name])
        state[name] = "done"

    for name in FILES:
        visit(name, [])


@each_room
def test_our_own_modules_that_are_imported_exist(name):
    missing = [each for each in imported(name) if each.split(".")[0] == "hbat" and each not in FILE_OF]
    assert not missing, f"src/hbat/{name} imports {missing}"


def test_every_folder_is_a_package():
    assert {each.parent for each in FILES.values()} == {each.parent for each in SOURCE.rglob("__init__.py")}


# --- tests -----------------------------------------------------------------------------------------------------------


def test_no_test_imports_another():
    tests = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    modules = {path.stem for path in tests if path.stem.startswith("test_")}
    for path, tree in tests.items():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        foreign = [node for node in imports if not (getattr(node, "module", "") or "").startswith("hbat")]
        names = {alias.name for node in foreign for alias in node.names} | {
            getattr(node, "module", "") for node in foreign
        }
        found = {name for name in names if name and name.rpartition(".")[2] in modules}
        assert not found, f"{path.relative_to(ROOT)} imports {found}: what tests share belongs into tests/support."


# --- how files look --------------------------------------------------------------------------------------------------


@each_file
def test_a_file_is_named_for_what_it_owns(name):
    parts = set(pathlib.PurePath(name).with_suffix("").parts)
    assert not {"utils", "util", "base", "common", "helpers", "misc"} & parts


@each_file
def test_a_file_begins_by_saying_what_it_owns(name):
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("/__init__.py")])
def test_a_wing_says_what_each_of_its_files_does(name):
    said = ast.get_docstring(TREES[name])
    folder = (SOURCE / name).parent
    files = {file.stem for file in folder.iterdir() if file.suffix == ".py" or (file / DOOR).is_file()} - {"__init__"}
    assert not [file for file in sorted(files) if not re.search(rf"`{file}/?`", said)]


def _calls(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


@each_file
def test_no_file_asserts(name):
    found = [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)]
    assert not found, f"src/hbat/{name} lines {found}: raise an exception; `python -O` drops assertions."


@each_file
def test_no_file_but_command_line_and_demo_prints(name):
    found = [line for line, called in _calls(name) if called == "print"]
    assert not found or name.startswith("cli/"), f"src/hbat/{name} lines {found}"


@each_file
def test_nothing_is_unpickled_or_evaluated(name):
    forbidden = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "__import__"}
    found = [(line, called) for line, called in _calls(name) if called in forbidden]
    assert not found
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & {
        each.split(".")[0] for each in imported(name)
    }


def _functions_imported(name):
    return {
        (node.module, each.name)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }


@each_file
def test_what_may_not_be_called_is_not_imported_under_another_name(name):
    forbidden = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "Loader"),
        ("yaml", "UnsafeLoader"),
        ("yaml", "FullLoader"),
    }
    assert not forbidden & _functions_imported(name)


# --- options ---------------------------------------------------------------------------------------------------------


def _option_classes():
    """Our dataclasses that users fill in: those with a help text on any field."""
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and "metadata=" in ast.unparse(node):
                yield getattr(importlib.import_module(module_of(name)), node.name)


def test_every_option_has_a_help_text_without_percent_signs():
    """argparse takes `%` in a help text for a format."""
    classes = list(_option_classes())
    assert {each.__name__ for each in classes} >= {"HBATConfig", "EWCConfig"}
    for config_class in classes:
        for each in dataclasses.fields(config_class):
            if each.name not in inspect.get_annotations(config_class):
                continue  # of transformers
            if config_class.__name__ == "RunFile" and each.name == "config":
                continue  # stands for all options of HBATConfig
            text = each.metadata.get("help", "")
            assert text.strip().endswith("."), f"{config_class.__name__}.{each.name} has no help text."
            assert "%" not in text, f"The help of {config_class.__name__}.{each.name} holds a percent sign."


# --- the front door --------------------------------------------------------------------------------------------------


STUB = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
PUBLIC = {name.name: node.module for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}


def test_the_stub_lists_every_public_name_once_and_exports_it():
    names = [name for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert all(name.asname == name.name for name in names)  # `X as X` exports X to type checkers
    assert sorted(name.name for name in names) == sorted(set(hbat.__all__) - {"__version__"})


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_defined_where_it_says(name):
    found = getattr(hbat, name)
    assert found.__module__ == PUBLIC[name]
    assert found.__doc__


def test_every_error_and_warning_that_users_meet_is_public():
    classes = {node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {name for name in classes if name.endswith(("Error", "Warning", "Interrupted")) and name[0] != "_"}
    assert found - set(hbat.__all__) == {"DamagedStateError", "PlainYAMLError"}  # a RunStateError, a ValueError


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hbat' has no attribute 'HBATrainer'"):
        _ = hbat.HBATrainer
    assert dir(hbat) == list(hbat.__all__)


@pytest.mark.parametrize("module", ["hbat", "hbat.cli.main"])
def test_importing_the_package_or_the_command_loads_no_host(module):
    program = f"import sys, json, {module}; dir(hbat); print(json.dumps(sorted(sys.modules)))"
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "safetensors", "matplotlib"}
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=SOURCE.parent
    ).stdout
    assert not heavy & set(json.loads(printed))


def test_the_version_is_that_of_the_installed_package():
    try:
        installed = metadata.version("hbat-trl")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is on the path but not installed, so it has no version")
    assert hbat.__version__ == installed
