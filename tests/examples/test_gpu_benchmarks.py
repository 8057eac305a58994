"""The GPU benchmarks run at toy size and save their measurements with the versions used."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("default")  # the scripts silence warnings about the toy size


def result_of(script, folder, monkeypatch, *words):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    monkeypatch.setattr(sys, "argv", [script, "--toy", "--repeats", "1", "--results", str(folder), *words])
    runpy.run_path(str(BENCHMARKS / "gpu" / script), run_name="__main__")
    (file,) = folder.glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {"torch", "trl", "peft"} <= result["about"].keys()
    assert {"device", "cuda", "bitsandbytes"} <= result["hardware"].keys()
    assert result["scale"] == "toy"
    return result


@pytest.mark.slow
def test_stages_are_measured_beside_plain_trl(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    result = result_of("stages.py", tmp_path, monkeypatch, "--precision", "qlora")
    variants = result["precisions"]["qlora"]
    assert [*variants] == ["plain TRL", "hbat, no EWC", "hbat, EWC"]
    for variant in variants.values():
        (measured,) = variant["runs"]
        assert [stage["objective"] for stage in measured["sft"]["stages"]] == ["sft", "sft"]
        assert [stage["objective"] for stage in measured["dpo"]["stages"]] == ["dpo", "dpo"]
        assert measured["sft"]["tokens_per_second"] > 0
        assert measured["dpo"]["peak"] > 0
    assert set(variants["plain TRL"]["over_plain"].values()) == {1.0}


def test_the_penalty_is_measured_against_a_copy(tmp_path, monkeypatch):
    result = result_of("penalty.py", tmp_path, monkeypatch)
    assert result["copy_bandwidth"] > 0
    assert len(result["sets"]) == 6
    for name, measured in result["sets"].items():
        bytes_per_element = (8 if "bfloat16" in name else 16) + (4 if "per element" in name else 0)
        assert measured["bytes"] == bytes_per_element * measured["elements"]
        speed = measured["bytes"] / measured["seconds"]
        assert measured["of_a_copy"] == pytest.approx(speed / result["copy_bandwidth"])
