import contextlib
import io
import json
import re

import pytest

from hbat.demo.run import methods, run
from hbat.demo.settings import DemoSettings


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One quick demo for all tests here: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = run(folder, seed=3, quick=True)
    assert status == 0
    return folder, printed.getvalue()


def test_the_demo_leaves_its_numbers_its_picture_and_a_model(demo):
    folder, _ = demo
    assert (folder / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "hbat" / "model.safetensors").exists()
    assert {each.name for each in folder.iterdir()} == {
        "demo.json", "trade-off.png", "hbat", "two-stage", "two-stage-tuned",
    }  # fmt: skip


def test_all_methods_take_the_same_number_of_steps(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    assert len({each["steps"] for each in saved["methods"]}) == 1


def test_scores_are_shown_before_between_and_after(demo):
    folder, printed = demo
    saved = json.loads((folder / "demo.json").read_text())
    hbat, *two_stage = saved["methods"]
    assert [label for label, _ in hbat["stages"]] == [
        f"{name} {number}/4" for number in range(1, 5) for name in ("SFT", "DPO")
    ]
    assert all([label for label, _ in each["stages"]] == ["SFT 1/1", "DPO 1/1"] for each in two_stage)
    rows = re.findall(r"(?:SFT|DPO) \d/\d", printed)
    assert len(rows) == 8 + 2 + 2
    for each in saved["methods"]:
        for label, scores in each["stages"]:
            assert re.search(rf"{label} │ +{100 * scores['accuracy']:.1f} %", printed)


def test_both_two_stage_runs_share_their_first_stage(demo):
    saved = json.loads((demo[0] / "demo.json").read_text())
    assert saved["methods"][1]["stages"][0] == saved["methods"][2]["stages"][0]


def test_what_came_out_is_said_and_what_to_try_next(demo):
    _, printed = demo
    assert printed.count("In answers that are both, HBAT") == 2
    assert "hbat train --config" in printed


def test_the_smaller_learning_rate_is_the_only_difference_between_the_two_stage_runs():
    hbat, shared, tuned = methods(DemoSettings())
    assert shared.options == tuned.options == {"num_rounds": 1, "ewc": None, "optimizer_state": "reset"}
    assert hbat.dpo_learning_rate == shared.dpo_learning_rate > tuned.dpo_learning_rate


@pytest.mark.slow
def test_a_second_demo_replaces_the_first_and_repeats_its_numbers(demo, capsys):
    folder, _ = demo
    first = json.loads((folder / "demo.json").read_text())
    run(folder, seed=3, quick=True)
    second = json.loads((folder / "demo.json").read_text())
    assert [each["stages"] for each in first["methods"]] == [each["stages"] for each in second["methods"]]
