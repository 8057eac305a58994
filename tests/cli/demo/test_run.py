import contextlib
import io
import json
import re

import pytest
import torch

from hbat.cli.demo.preference import Preference
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
            status = run(folder, seed=3, quick=True, preference=request.param)
    assert status == 0
    return folder, printed.getvalue(), request.param


def test_the_demo_leaves_its_numbers_its_picture_and_a_model(demo):
    folder, *_ = demo
    assert (folder / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "hbat" / "model.safetensors").exists()
    assert {path.name for path in folder.iterdir()} == {
        "demo.json", "trade-off.png", "hbat", "two-stage", "two-stage-tuned",
    }  # fmt: skip


def test_all_methods_take_the_same_number_of_steps(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    assert saved["preference"] == demo[2]
    assert len({method["steps"] for method in saved["methods"]}) == 1


def test_scores_are_shown_before_between_and_after(demo):
    folder, printed, preference = demo
    name = preference.upper()
    saved = json.loads((folder / "demo.json").read_text())
    hbat, *two_stage = saved["methods"]
    assert [label for label, _ in hbat["stages"]] == [
        f"{objective} {number}/4" for number in range(1, 5) for objective in ("SFT", name)
    ]
    assert all([label for label, _ in method["stages"]] == ["SFT 1/1", f"{name} 1/1"] for method in two_stage)
    rows = re.findall(rf"(?:SFT|{name}) \d/\d", printed)
    assert len(rows) == 8 + 2 + 2
    for method in saved["methods"]:
        for label, scores in method["stages"]:
            assert re.search(rf"{label} │ +{100 * scores['accuracy']:.1f} %", printed)


def test_both_two_stage_runs_share_their_first_stage(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    assert saved["methods"][1]["stages"][0] == saved["methods"][2]["stages"][0]


def test_what_came_out_is_said_and_what_to_try_next(demo):
    _, printed, _ = demo
    assert printed.count("In answers that are both, HBAT") == 2
    assert "hbat train --config" in printed


def test_ppo_is_rewarded_by_what_the_judge_gives(demo):
    folder, _, preference = demo
    log = json.loads((folder / "two-stage" / "trainer_state.json").read_text())["log_history"]
    rewards = [entry["ppo/reward"] for entry in log if "ppo/reward" in entry]
    assert bool(rewards) == (preference == "ppo")
    assert all(-6 < reward < 3 for reward in rewards)


@pytest.mark.parametrize("preference", ["dpo", "ppo"])
def test_the_smaller_learning_rate_is_the_only_difference_between_the_two_stage_runs(preference):
    hbat, shared, tuned = methods(DemoSettings(), Preference.of(preference, DemoSettings()))
    assert shared.options == tuned.options == {"num_rounds": 1, "ewc": None, "optimizer_state": "reset"}
    assert hbat.learning_rate == shared.learning_rate > tuned.learning_rate
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
    assert [method["stages"] for method in first["methods"]] == [method["stages"] for method in second["methods"]]
