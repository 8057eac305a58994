"""The table of what runs with what: it names tests that exist, and the page says what it says."""

import ast
import subprocess
import sys
from pathlib import Path

import cases
import ppo_cases
import pytest
import runs
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from support_page import main, page
from support_table import COLUMNS, ENGINES, Shown, cells

from hbat.config.hbat import HBATConfig
from hbat.engines.checks import refusal
from hbat.engines.refusals import EVERYWHERE, REFUSALS, Refusal
from hbat.trainer import HBATTrainer

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "support.md"
NAMED = sorted({each.by for each in cells() if isinstance(each, Shown)})


def test_the_page_is_written_from_the_table(tmp_path):
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page()
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/support.md is not the table's: run `make support`."


def test_every_engine_has_a_cell_for_each_way_to_train():
    assert {len(row) for row in ENGINES.values()} == {len(COLUMNS)}


def test_every_refusal_stands_in_the_table_and_every_refused_cell_has_one():
    assert {each for each in cells() if isinstance(each, str)} == {*REFUSALS}
    assert all(set(each.at) <= set(EVERYWHERE) and each.at for each in REFUSALS.values())


def test_every_test_that_the_table_names_exists():
    for name in NAMED:
        path, _, function = name.partition("[")[0].partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        functions = [each.name for each in tree.body if isinstance(each, ast.FunctionDef)]
        assert function in functions if function else any(each.startswith("test_") for each in functions), name


@pytest.mark.slow
def test_pytest_finds_what_the_table_names():
    """A file and a function stand for all their tests, slow ones too."""
    files = sorted({str(TESTS / each.partition("::")[0]) for each in NAMED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *files]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS.parent).stdout.splitlines()
    collected = [each.removeprefix("tests/") for each in found if "::" in each]
    for name in NAMED:
        assert any(each == name or each.startswith((f"{name}::", f"{name}[")) for each in collected), name


def test_the_checks_refuse_the_engines_that_the_table_refuses():
    by_model = {"`device_map` over several devices", "`device_map` with offload to CPU or disk"}
    by_count = {"several GPUs in one process (`DataParallel`)"}
    for engine in ENGINES.keys() - by_model - by_count:
        for column, cell in zip(COLUMNS, ENGINES[engine], strict=True):
            assert refusal(engine, quantised="bit" in column) is (REFUSALS[cell] if isinstance(cell, str) else None)


def test_a_message_shows_the_values_seen():
    error = Refusal("Not {what!r}: {{}}.", kind=NotImplementedError).error(what="this")
    assert isinstance(error, NotImplementedError)
    assert str(error) == "Not 'this': {}."


# --- cells that no other file shows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preference", ["dpo", "ppo"])
def test_a_copy_of_the_head_is_trained_beside_the_adapter(preference, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(cases.tiny_llama(), adapter)
    before = cases.weights(model)
    rows = {"sft": cases.sft_rows(8), "dpo": cases.preference_rows(8), "ppo": ppo_cases.prompts(8)}
    sizes = {key: each for key, each in ppo_cases.SIZES.items() if key != "max_steps"} if preference == "ppo" else {}
    config = HBATConfig(
        output_dir=str(tmp_path),
        objectives=["sft", preference],
        num_rounds=1,
        disable_tqdm=True,
        sft=runs.section(),
        **{preference: runs.section(**sizes)},
    )
    run = HBATTrainer(
        model,
        config,
        {name: rows[name] for name in ("sft", preference)},
        processing_class=cases.tiny_tokenizer(),
        reward_funcs=ppo_cases.letters if preference == "ppo" else None,
    )
    run.train()
    (head,) = (name for name in before if "lm_head" in name)
    assert not torch.equal(before[head], cases.weights(run.model)[head])
    first = "dpo/rewards/chosen" if preference == "dpo" else "ppo/kl"
    assert runs.logged(run, first)[0] == 0.0


VIRTUAL = [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
]


@pytest.mark.parametrize("adapter", VIRTUAL, ids=lambda each: type(each).__name__)
def test_sft_alone_takes_virtual_tokens(adapter, tmp_path):
    config = HBATConfig(
        output_dir=str(tmp_path), objectives=["sft"], num_rounds=2, disable_tqdm=True, sft=runs.section()
    )
    run = HBATTrainer(
        cases.tiny_llama(),
        config,
        {"sft": cases.sft_rows(8)},
        processing_class=cases.tiny_tokenizer(),
        peft_config=adapter,
    )
    before = cases.weights(run.model)
    run.train()
    assert not runs.same(before, cases.weights(run.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's, in its own compiler
def test_a_compiled_model_trains_as_it_does_otherwise(tmp_path):
    """The backend does what the eager model does; that a compiler's code is right is not shown here."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    settings = {"ewc": {"strength": 1.0}, "num_rounds": 1}
    eager = runs.train(cases.tiny_llama(), tmp_path / "eager", **settings)
    other = runs.train(cases.tiny_llama(), tmp_path / "compiled", sft=compiled, dpo=compiled, **settings)
    assert cases.largest_difference(cases.weights(eager.model), cases.weights(other.model)) < 1e-5
