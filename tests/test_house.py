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

ROOMS = [name for name in FILES if name != DOOR]


def module_of(name):
    return "hbat." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


FILE_OF = {module_of(name): name for name in ROOMS} | {"hbat": DOOR}


def offences(found, names=FILES):
    """What a rule finds in the files that break it, by name: all of them, so that one run of the tests names them."""
    return {f"src/hbat/{name}": offence for name in names if (offence := found(name))}


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


def test_a_file_imports_only_from_its_own_wing_or_one_before_it():
    def later(name):
        return [each for each in own(name) - {DOOR} if ORDER.index(wing(each)) > ORDER.index(wing(name))]

    wrong = offences(later, [name for name in ROOMS if name != "__main__.py"])
    assert not wrong, (
        f"{wrong} import from later wings: {' < '.join(ORDER)}. Move what they need to an earlier wing, or the file "
        "to a later one."
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


def test_every_patch_on_a_trainer_stands_in_one_file():
    def patches(name):
        assigned = [
            (node.lineno, ast.unparse(target))
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Assign) and ast.unparse(node.value) != "None"
            for target in node.targets
        ]
        return [each for each in assigned if re.search(r"(trainer|accelerator|sampler)\.\w+$", each[1])]

    found = offences(patches, ROOMS)
    assert not found, f"{found}: patches belong into engines/patches.py, with their undo."


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


def test_our_own_modules_that_are_imported_exist():
    def missing(name):
        return [each for each in imported(name) if each.split(".")[0] == "hbat" and each not in FILE_OF]

    assert not offences(missing, ROOMS)


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


def test_a_file_is_named_for_what_it_owns():
    vague = {"utils", "util", "base", "common", "helpers", "misc"}
    assert not offences(lambda name: vague & {*pathlib.PurePath(name).with_suffix("").parts})


def test_a_file_begins_by_saying_what_it_owns():
    assert not offences(lambda name: not ast.get_docstring(TREES[name]))


def test_a_wing_says_what_each_of_its_files_does():
    def untold(name):
        said, folder = ast.get_docstring(TREES[name]), (SOURCE / name).parent
        files = {each.stem for each in folder.iterdir() if each.suffix == ".py" or (each / DOOR).is_file()}
        return [file for file in sorted(files - {"__init__"}) if not re.search(rf"`{file}/?`", said)]

    assert not offences(untold, [name for name in FILES if name.endswith("/__init__.py")])


def _calls(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_no_file_asserts():
    found = offences(lambda name: [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)])
    assert not found, f"{found}: raise an exception; `python -O` drops assertions."


def test_no_file_but_command_line_and_demo_prints():
    others = [name for name in FILES if not name.startswith("cli/")]
    assert not offences(lambda name: [line for line, called in _calls(name) if called == "print"], others)


def test_nothing_is_unpickled_or_evaluated():
    calls = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "__import__"}
    packages = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not offences(lambda name: [(line, called) for line, called in _calls(name) if called in calls])
    assert not offences(lambda name: packages & {each.split(".")[0] for each in imported(name)})


def test_what_may_not_be_called_is_not_imported_under_another_name():
    forbidden = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "Loader"),
        ("yaml", "UnsafeLoader"),
        ("yaml", "FullLoader"),
    }

    def imports(name):
        nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
        return forbidden & {(node.module, each.name) for node in nodes for each in node.names}

    assert not offences(imports)


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


def test_every_public_name_is_there_and_defined_where_it_says():
    found = {name: getattr(hbat, name) for name in PUBLIC}
    assert {name: each.__module__ for name, each in found.items()} == PUBLIC
    assert [name for name, each in found.items() if not each.__doc__] == []


def test_every_error_and_warning_that_users_meet_is_public():
    classes = {node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {name for name in classes if name.endswith(("Error", "Warning", "Interrupted")) and name[0] != "_"}
    assert found - set(hbat.__all__) == {"DamagedStateError", "PlainYAMLError"}  # a RunStateError, a ValueError


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hbat' has no attribute 'HBATrainer'"):
        _ = hbat.HBATrainer
    assert dir(hbat) == list(hbat.__all__)


def test_importing_the_package_loads_no_host():
    program = "import sys, json, hbat; dir(hbat); print(json.dumps(sorted(sys.modules)))"
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
