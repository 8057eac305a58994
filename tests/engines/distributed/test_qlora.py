"""Two processes train one adapter on a quantised base, each with its own copy of it."""

import json
from pathlib import Path

import cases
import launched
import pytest
import qlora_cases
import qlora_runs
import runs
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = qlora_cases.save_base(tmp_path_factory.mktemp("two"))
    launched.succeeded(launched.launch(qlora_runs, folder))
    return folder


def read(folder, name, rank):
    place = launched.place_of(folder, name)
    return load_file(place / f"{rank}.safetensors"), json.loads((place / f"{rank}.json").read_text())


def logged(log, key):
    return [value for entry in log for name, value in entry.items() if f"/{name}".endswith(f"/{key}")]


@pytest.mark.parametrize("name", qlora_runs.RUNS)
def test_two_processes_train_one_adapter(name, two, tmp_path):
    weights, log = read(two, name, 0)
    assert runs.same(weights, read(two, name, 1)[0])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    start = cases.weights(qlora_cases.qlora(two, qlora_runs.RUNS[name][0]))
    assert cases.largest_difference(weights, start) > 1e-3
    first = "ppo/kl" if "ppo" in name else "dpo/rewards/chosen"
    assert [logged(log, first)[index] for index in (0, len(logged(log, first)) // 2)] == [0.0, 0.0]
    assert max(logged(log, "ewc/penalty")) > 0.0


@pytest.mark.parametrize("name", ["4-bit", "8-bit"])
def test_their_losses_are_those_of_one_process(name, two, tmp_path):
    """To the eight bits of bfloat16, in which the processes' gradients are summed."""
    _, log = read(two, name, 0)
    expected = qlora_runs.train(name, two, tmp_path).state.log_history
    for key in ("sft/loss", "dpo/loss"):
        assert logged(log, key) == pytest.approx(logged(expected, key), rel=2e-3)
    # Of the penalty the difference of weights counts, of which rounding is a larger part.
    assert logged(log, "ewc/penalty") == pytest.approx(logged(expected, "ewc/penalty"), rel=0.2, abs=1e-6)
    assert [entry.get("step") for entry in log] == [entry.get("step") for entry in expected]
    assert Path(two, name, "run", "hbat_state.json").exists()
