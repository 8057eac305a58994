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

#: Blocks from the top: a file imports from its own block or one above. Each with what it may import besides.
BLOCKS = {
    "mathematics: tensors in, tensors out": (
        {"torch"},
        [
            "ewc/__init__", "ewc/shards", "ewc/parameters", "ewc/importance", "ewc/offload", "ewc/blocks",
            "ewc/foreach", "ewc/statistics", "ewc/penalty", "ewc/placement", "ewc/fisher", "ppo/returns",
            "ppo/losses", "ppo/log_probs",
        ],
    ),
    "plan and state: plain data, imports no trainer": (
        {"torch", "safetensors", "datasets", "numpy", "pyarrow", "xxhash", "yaml"},
        [
            "sections", "field_checks", "plain_yaml", "ewc_config", "config", "rounds", "turns", "row_parts", "rows",
            "host_columns", "prompt_rows", "row_search", "loading", "datasets",
            "consolidation", "processes", "checksums", "storage", "data_digest", "fingerprint", "manifest", "changes",
            "refusals", "support", "zero", "kept_states", "run_lock", "run_state", "checkpoints", "resuming", "run",
            "evaluation",
            "ppo/schedule",
        ],
    ),
    "adapters: the files that know the host": (
        {
            "torch", "safetensors", "datasets", "transformers", "trl", "peft", "accelerate", "tqdm", "matplotlib",
            "huggingface_hub",
        },
        [
            "ewc/backward", "ewc/fragments", "ewc/partitions", "ewc/penalty_log", "ewc/callback", "lifecycle",
            "loaded_shards",
            "objectives/__init__", "objectives/objective",
            "objectives/rewards", "objectives/builtin", "objectives/sft", "objectives/dpo",
            "objectives/kto", "objectives/online", "objectives/grpo", "objectives/rloo", "stage_start",
            "zero_moments", "zero3_moments", "optimizer_state", "interruption", "data_order", "learning_rate",
            "nonfinite", "hub", "inputs",
            "row_fit", "left_out", "checkpoint_loading",
            "model_loading", "model_saving", "adapter_checkpoints", "unsupported",
            "run_log", "reporting", "sealing", "sharding",
            "zero_precision", "trainer_builder", "rehearsal", "evaluator", "stage_runner", "plots", "report",
            "run_scores", "trainer",
            "ppo/__init__", "ppo/awaiting", "ppo/callable_reward", "ppo/reward_model", "ppo/rewards",
            "reference_adapter", "ppo/config", "ppo/requirements", "ppo/prompts", "ppo/generation", "ppo/token_model",
            "ppo/critic", "ppo/policy", "ppo/reference", "ppo/rollout", "ppo/scored", "ppo/collector", "ppo/update",
            "ppo/evaluation", "ppo/progress", "ppo/checkpoints", "ppo/sharded", "ppo/trainer", "objectives/ppo",
            "objectives/trl_ppo", "objectives/trl_ppo_models", "objectives/trl_ppo_options",
            "objectives/trl_ppo_trainer",
        ],
    ),
    "faces: command line and demo": (
        {"torch", "datasets", "transformers", "tokenizers", "peft", "bitsandbytes", "tqdm", "rich", "matplotlib"},
        [
            "run_file", "reward_functions", "assembly", "summary", "support_page", "cli", "demo/__init__", "demo/task",
            "demo/base_model", "demo/scoring", "demo/settings", "demo/preference", "demo/results", "demo/run",
            "__main__",
        ],
    ),
}  # fmt: skip
RANK = {f"{name}.py": rank for rank, (_, names) in enumerate(BLOCKS.values()) for name in names}
TITLES = list(BLOCKS)

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


@each_room
def test_every_file_stands_in_a_block(name):
    assert name in RANK, (
        f"src/hbat/{name} stands in no block. Add it to BLOCKS in tests/test_house.py, to the highest one whose "
        "description fits: what it imports must stand in the same block or above."
    )


@each_room
def test_a_file_imports_only_from_its_own_block_or_one_above(name):
    wrong = [each for each in own(name) if each != DOOR and RANK.get(each, 0) > RANK.get(name, 0)]
    assert not wrong, (
        f"src/hbat/{name} ({TITLES[RANK[name]]}) imports {wrong}, which stand below it. Move what it needs up, or the "
        "file down."
    )


@each_room
def test_a_file_imports_only_the_packages_of_its_block(name):
    allowed, _ = list(BLOCKS.values())[RANK.get(name, -1)]
    packages = {each.split(".")[0] for each in imported(name)} - set(sys.stdlib_module_names) - {"hbat"}
    assert packages <= allowed, (
        f"src/hbat/{name} imports {sorted(packages - allowed)}, which its block ({TITLES[RANK.get(name, -1)]}) does "
        "without. Move that part to a file of a block below."
    )


def test_only_the_faces_come_in_by_the_front_door():
    through_door = {name for name in FILES if DOOR in own(name)}
    assert through_door <= {"cli.py"}  # the version


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


def test_only_our_own_modules_are_listed_once_in_the_blocks():
    listed = [f"{name}.py" for _, names in BLOCKS.values() for name in names]
    assert len(listed) == len(set(listed))


@each_room
def test_our_own_modules_that_are_imported_exist(name):
    missing = [each for each in imported(name) if each.split(".")[0] == "hbat" and each not in FILE_OF]
    assert not missing, f"src/hbat/{name} imports {missing}"


def test_every_folder_is_a_package():
    assert {each.parent for each in FILES.values()} == {each.parent for each in SOURCE.rglob("__init__.py")}


# --- how files look --------------------------------------------------------------------------------------------------


@each_file
def test_a_file_is_short_enough_to_read(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"src/hbat/{name} has {lines} lines: split it by its reasons to change."


#: Files whose name only looks like one of those that say nothing.


@each_file
def test_a_file_is_named_for_what_it_owns(name):
    parts = set(pathlib.PurePath(name).with_suffix("").parts)
    assert not {"utils", "util", "base", "common", "helpers", "misc"} & parts


@each_file
def test_a_file_begins_by_saying_what_it_owns(name):
    assert ast.get_docstring(TREES[name])


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
    assert not found or name == "cli.py" or name.startswith("demo/"), f"src/hbat/{name} lines {found}"


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
                continue  # the host's
            if config_class.__name__ == "RunFile" and each.name == "config":
                continue  # stands for all options of HBATConfig
            text = each.metadata.get("help", "")
            assert text.strip().endswith("."), f"{config_class.__name__}.{each.name} has no help text."
            assert "%" not in text, f"The help of {config_class.__name__}.{each.name} holds a percent sign."


# --- the front door --------------------------------------------------------------------------------------------------


def _names_for_type_checkers():
    (block,) = [each for each in TREES[DOOR].body if isinstance(each, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    homes = {each.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for each in node.names}
    variables = {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)}
    return homes, variables


def test_the_three_lists_of_public_names_agree():
    homes, variables = _names_for_type_checkers()
    assert homes == hbat._HOMES  # noqa: SLF001 - this test is about the package itself
    assert sorted({*homes, *variables}) == sorted(hbat.__all__)
    assert len(set(hbat.__all__)) == len(hbat.__all__)


@pytest.mark.parametrize("name", [each for each in hbat.__all__ if each != "__version__"])
def test_every_public_name_is_there_and_defined_where_it_says(name):
    found = getattr(hbat, name)
    assert found.__module__ == hbat._HOMES[name]  # noqa: SLF001
    assert found.__doc__


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hbat' has no attribute 'HBATrainer'"):
        _ = hbat.HBATrainer
    assert dir(hbat) == list(hbat.__all__)


@pytest.mark.parametrize("module", ["hbat", "hbat.cli"])
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


# --- documents and tests that mirror the source ----------------------------------------------------------------------


def _tree_in(text):
    """File names of the first block that begins with `src/hbat/`, with folders put before those indented below."""
    block = re.search(r"^([ ]*)src/hbat/.*\n((?:\1[ │├└─|`-]+\S.*\n|\s*\n)+)", text, re.MULTILINE)
    if block is None:
        return None
    names, folders = set(), []
    for line in block[2].splitlines():
        entry = re.match(r"^([ │├└─|`-]*)((?:[\w./-]+(?:, |  ?(?=\w+\.py))?)+)", line)
        if entry is None:
            continue
        while folders and folders[-1][0] >= len(entry[1]):
            folders.pop()
        prefix = folders[-1][1] if folders else ""
        for word in re.findall(r"[\w./-]+", entry[2]):
            if word.endswith("/"):
                folders.append((len(entry[1]), prefix + word))
                prefix += word
            elif word.endswith(".py"):
                names.add(prefix + word)
    return names


def test_the_tree_in_the_readme_names_the_files_on_disk():
    named = _tree_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert named is not None, "README.md holds no tree of src/hbat."
    entries = {name for name in FILES if pathlib.PurePath(name).stem in {"__init__", "__main__"}}  # may be left out
    missing, gone = {*FILES} - named - entries, named - {*FILES}
    assert not missing, f"not in the tree of README.md: {sorted(missing)}"
    assert not gone, f"in the tree of README.md but not in src/hbat: {sorted(gone)}"


def test_a_tree_is_read_with_its_folders():
    text = (
        "intro\n\n    src/hbat/\n      __init__.py  __main__.py\n      config.py     the fields of a.py run\n"
        "      ewc/parameters.py   names\n      demo/\n        task.py\n      cli.py\n\nafter.py\n"
    )
    expected = {"__init__.py", "__main__.py", "config.py", "ewc/parameters.py", "demo/task.py", "cli.py"}
    assert _tree_in(text) == expected
    assert _tree_in("no tree here\n") is None
    drawn = "src/hbat/\n├── config.py   x\n├── demo/\n│   └── task.py\n└── cli.py\n"
    assert _tree_in(drawn) == {"config.py", "demo/task.py", "cli.py"}


#: Files without a test file of their own, with the ones that test them.
TESTED_ELSEWHERE = {
    "__init__.py": "test_house.py",
    "__main__.py": "test_cli.py",
    "assembly.py": "test_cli.py",
    "demo/settings.py": "demo/test_base_model.py",
    "ewc/blocks.py": "ewc/test_penalty.py",
    "ewc/penalty_log.py": "ewc/test_callback.py",
    "ewc/fragments.py": "distributed/test_deepspeed.py",
    "ewc/partitions.py": "distributed/test_deepspeed.py",
    "ewc/statistics.py": "ewc/test_penalty.py",
    "ewc_config.py": "test_config.py",
    "field_checks.py": "test_config.py",
    "evaluator.py": "test_trainer_reports.py",
    "inputs.py": "test_trainer_construction.py",
    "loaded_shards.py": "distributed/test_fsdp2_native.py",
    "model_saving.py": "test_trainer_reports.py",
    "objectives/trl_ppo_models.py": "objectives/test_trl_ppo.py",
    "objectives/trl_ppo_options.py": "objectives/test_trl_ppo.py",
    "objectives/trl_ppo_trainer.py": "objectives/test_trl_ppo.py",
    "ppo/checkpoints.py": "ppo/test_resume.py",
    "ppo/collector.py": "ppo/test_trainer.py",
    "ppo/config.py": "ppo/test_requirements.py",
    "ppo/critic.py": "ppo/test_trainer.py",
    "ppo/evaluation.py": "ppo/test_trainer.py",
    "ppo/policy.py": "ppo/test_trainer.py",
    "ppo/progress.py": "ppo/test_resume.py",
    "ppo/reference.py": "ppo/test_trainer.py",
    "ppo/scored.py": "ppo/test_trainer.py",
    "ppo/sharded.py": "distributed/test_fsdp2.py",
    "ppo/update.py": "ppo/test_trainer.py",
    "reference_adapter.py": "test_stage_start.py",
    "refusals.py": "test_unsupported.py",
    "rehearsal.py": "test_trainer_construction.py",
    "resuming.py": "test_run.py",
    "trainer_builder.py": "test_trainer.py",
    "zero_moments.py": "distributed/test_deepspeed.py",
    "zero3_moments.py": "distributed/test_deepspeed.py",
    "plain_yaml.py": "test_run_file.py",
    "objectives/grpo.py": "objectives/test_online.py",
    "objectives/rloo.py": "objectives/test_online.py",
    "run_scores.py": "test_trainer_reports.py",
    "host_columns.py": "test_rows.py",
    "row_parts.py": "test_rows.py",
    "row_search.py": "test_datasets.py",
    "summary.py": "test_cli.py",
    "support_page.py": "test_support.py",
    "turns.py": "test_rows.py",
}
#: Files that no test runs yet. It may only shrink.
UNTESTED = {"demo/results.py", "demo/run.py", "processes.py"}


@pytest.mark.parametrize("name", [each for each in FILES if not each.endswith("/__init__.py")])
def test_every_file_has_its_tests(name):
    path = pathlib.PurePath(name)
    mirror = ROOT / "tests" / path.with_name(f"test_{path.name}")
    assert mirror.exists() or name in TESTED_ELSEWHERE, (
        f"src/hbat/{name} has no tests/{mirror.relative_to(ROOT / 'tests')}. Write it, or say in TESTED_ELSEWHERE "
        "which file tests it."
    )


def test_what_is_tested_elsewhere_is_there():
    assert TESTED_ELSEWHERE.keys() <= {*FILES}
    assert [each for each in TESTED_ELSEWHERE.values() if not (ROOT / "tests" / each).exists()] == []
