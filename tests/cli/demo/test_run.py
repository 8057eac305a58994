import contextlib
import io
import json

import pytest
import torch

from hbat.cli.demo.run import methods, run
from hbat.cli.demo.settings import DemoSettings


@pytest.fixture(scope="module", params=["dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def demo(tmp_path_factory, request):
    """A quick demo: its folder, what it printed, and its preference objective."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run(folder, seed=3, quick=True, preference=request.param)
    return folder, printed.getvalue(), request.param


def test_the_demo_leaves_its_numbers_its_picture_and_a_model(demo):
    folder, *_ = demo
    assert (folder / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "hbat" / "seed-3" / "model.safetensors").exists()
    assert len([path for path in folder.iterdir() if path.name.startswith("two-stage-")]) == 3


def test_all_methods_take_the_same_number_of_steps(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    assert saved["preference"] == demo[2]
    assert len({method["steps"] for method in saved["methods"]}) == 1


def test_every_method_is_scored_from_the_start_to_the_end_of_its_last_stage(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    for method in saved["methods"]:
        (points,) = method["runs"]
        assert [point["end_weight"] for point in points] == [0.0, 0.25, 0.5, 0.75, 1.0]
        # Nothing holds back the first stage, so that all methods share it.
        assert points[0] == saved["methods"][0]["runs"][0][0]


def test_what_came_out_is_said_and_what_to_try_next(demo):
    _, printed, _ = demo
    assert "of 12 points of two-stage training" in printed
    assert "hbat train --config" in printed


def test_ppo_is_rewarded_by_what_the_judge_gives(demo):
    folder, _, preference = demo
    log = json.loads((folder / "hbat" / "seed-3" / "trainer_state.json").read_text())["log_history"]
    rewards = [entry["ppo/reward"] for entry in log if "ppo/reward" in entry]
    assert bool(rewards) == (preference == "ppo")
    assert all(-6 < reward < 3 for reward in rewards)


@pytest.mark.parametrize("preference", ["dpo", "ppo"])
def test_hbat_takes_its_defaults_and_the_largest_learning_rate_of_two_stage_training(preference):
    hbat, *two_stage = methods(preference, DemoSettings())
    assert hbat.options == {}
    assert all(method.options == {"num_rounds": 1, "ewc": None, "optimizer_state": "reset"} for method in two_stage)
    assert hbat.learning_rate == max(method.learning_rate for method in two_stage)
    assert preference.upper() in hbat.name


@pytest.mark.slow
def test_a_second_demo_replaces_the_first_and_repeats_its_numbers_on_any_number_of_threads(demo):
    folder, _, preference = demo
    first = json.loads((folder / "demo.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(folder, seed=3, quick=True, preference=preference)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    second = json.loads((folder / "demo.json").read_text())
    assert first["methods"] == second["methods"]
