import pytest

from hbat.cli.demo.results import Outcome, draw_trade_off, verdict
from hbat.cli.demo.scoring import Scores


def outcome(name, joint):
    return Outcome(name, [("SFT 1/1", Scores(1.0, 0.0, 0.0, 0.0)), ("DPO 1/1", Scores(1.0, 1.0, joint, 0.0))], 1, 1.0)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (0.8, "HBAT is 30.0 points ahead of two"),
        (0.2, "HBAT is 30.0 points behind two"),
        (0.5, "HBAT is level with two"),
    ],
)
def test_the_verdict_says_what_came_out(own, said):
    assert said in verdict([outcome("HBAT", own), outcome("two", 0.5)])


def test_the_picture_is_drawn_and_left_out_without_matplotlib(tmp_path, monkeypatch):
    base, outcomes = Scores(0.5, 0.0, 0.0, 0.0), [outcome("HBAT", 0.8)]
    assert draw_trade_off(base, outcomes, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("hbat.cli.demo.results.can_draw", lambda: False)
    assert draw_trade_off(base, outcomes, tmp_path / "b.png") is None
    assert not (tmp_path / "b.png").exists()
