"""The real-text part of the evidence, on a tiny model: what it measures, and what its records say."""

import json
from importlib import import_module
from pathlib import Path

import cases
import pytest
import runs

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "alignment"

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, about defaults that the script keeps


@pytest.fixture
def script(monkeypatch, shared_data):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(SCRIPTS)
    module = import_module("real_text")
    monkeypatch.setattr(module, "DATA", shared_data)
    monkeypatch.setenv("HBAT_SHARED_DATA", str(shared_data))  # for its workers
    return module


@pytest.fixture
def size(script):
    """Rows in tokens of a byte."""
    return script.Size(
        instructions=16, pairs=16, held_out_instructions=6, held_out_pairs=6, paragraphs=2, max_tokens=400
    )


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    cases.tiny_llama().save_pretrained(folder)
    cases.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_scores_are_those_of_the_trainers_evaluation(script, size, tmp_path):
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = script.CHAT_TEMPLATE
    rows = script.Rows(tokenizer, size, seed=1)
    section = {"per_device_eval_batch_size": 6, "max_length": 400}
    run = runs.HBATTrainer(
        model=cases.tiny_llama(),
        args=runs.config(tmp_path, num_rounds=1, sft=section, dpo=section | {"beta": script.BETA}),
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
    )
    reference = script.preferences(run.model, rows)
    run.train()
    expected, found = run.evaluate(), script.scores(run.model, rows, reference)
    assert found["sft_loss"] == pytest.approx(expected["sft"]["loss"], rel=1e-5)
    assert found["preference_loss"] == pytest.approx(expected["dpo"]["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(expected["dpo"]["rewards/accuracies"])
    assert found["margin"] == pytest.approx(expected["dpo"]["rewards/margins"], rel=1e-4)
    assert abs(found["margin"]) > 1e-3


@pytest.mark.slow
def test_dpo_after_the_shared_sft_stage_ends_where_a_whole_run_does(script, size, model, tmp_path):
    results = tmp_path / "results"
    jobs = [script.Job(3), script.Job(3, 0.0, 1e-2), script.Job(3, 1.0, 1e-2)]
    script.work(jobs, size, model, results, workers=1)
    records = {record["method"]: record for record in script.read(results)}
    assert [*records] == ["SFT", "two-stage, DPO at 0.01", "path, strength 1, DPO at 0.01"]
    assert records["SFT"]["points"]["start"]["margin"] == 0

    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = script.CHAT_TEMPLATE
    rows = script.Rows(tokenizer, size, 3)
    whole = script.build(jobs[1], rows, model, tmp_path / "whole", [])
    reference = script.preferences(whole.model, rows)
    whole.train()
    end = script.scores(whole.model, rows, reference)
    assert records["two-stage, DPO at 0.01"]["points"]["1"] == end
    assert records["path, strength 1, DPO at 0.01"]["points"]["1"] != end

    before = (results / "runs.jsonl").read_text(encoding="utf-8")
    script.work(jobs, size, model, results, workers=1)
    assert (results / "runs.jsonl").read_text(encoding="utf-8") == before
    script.report(results)
    assert len((results / "table.md").read_text(encoding="utf-8").splitlines()) == 2 + 2 + 3 * len(script.SHARES)
    assert (results / "front.png").stat().st_size > 1000


def record(seed, rate, points, strength=0):
    method = "path" if strength else "SFT" if rate is None else "two-stage"
    return {"seed": seed, "method": method, "rate": rate, "strength": strength, "points": points}


def test_a_row_of_the_table_is_the_mean_over_the_seeds_with_its_interval(script, tmp_path):
    losses = [1.0, 2.0, 4.0]
    rows = [record(seed, 1e-3, {"1": dict.fromkeys(script.COLUMNS, loss)}) for seed, loss in enumerate(losses)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    *_, line = script.table(script.read(tmp_path)).splitlines()
    # The half width is that of SciPy's `stats.t.interval`.
    assert line.startswith("| two-stage | 1 | 2.333 ± 3.795 |")


def test_the_penalty_is_compared_with_two_stages_of_the_same_seed(script, tmp_path):
    losses = {0: [1.0, 2.0, 4.0], 1: [0.9, 1.8, 3.7]}
    rows = [
        record(seed, 1e-3, {"1": dict.fromkeys(script.COLUMNS, loss)}, strength)
        for strength, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    *_, line = script.table(rows).splitlines()
    assert line.startswith("| path, minus two-stage | 1 | -0.200 ± 0.248 |")
