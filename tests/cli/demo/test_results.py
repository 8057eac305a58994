import pytest

from hbat.cli.demo.results import Outcome, Point, draw_trade_off, print_results, verdict
from hbat.cli.demo.scoring import Scores


def outcome(name, *joints):
    """An outcome of one seed for each number; the end has it, points before it have less."""
    runs = [
        [Point(at, *[Scores(1.0, at, at * joint, 0.0)] * 2) for at in (0.0, 0.5, 1.0)] for joint in joints
    ]  # fmt: skip
    return Outcome(name, runs, 24)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ((0.8, 0.82, 0.78), "HBAT is ahead: 80.0 % of its sampled answers are both at point 1, against 50.0 %"),
        ((0.2, 0.22, 0.18), "HBAT is behind: 20.0 %"),
        ((0.8, 0.2, 0.5), "Undecided: 50.0 %"),
        (
            (0.8, 0.82, 0.78),
            "of 4 points of two-stage training\n(two, point 1): +30.0 points, 95 % interval [+25.0, +35.0]",
        ),
    ],
)
def test_the_verdict_compares_the_best_points_over_the_seeds(own, said):
    assert said in verdict([outcome("HBAT", *own), outcome("worse", 0.1, 0.1, 0.1), outcome("two", 0.5, 0.5, 0.5)])


def test_one_seed_decides_nothing():
    assert verdict([outcome("HBAT", 0.8), outcome("two", 0.5)]).startswith("Undecided")


def test_the_table_fits_eighty_columns_and_has_every_point(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcomes = [outcome("HBAT, DPO 5e-4", 0.8, 0.8), outcome("two-stage, DPO 5e-4", 0.5, 0.5)]
    print_results(outcomes, seconds=3.0, files=[])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "│ HBAT, DPO 5e-4      │ 1     │ 100.0 │ 100.0 │ 80.0 │" in printed
    assert printed.count("│ 0.5   │") == 2


def test_the_picture_is_drawn_and_left_out_without_matplotlib(tmp_path, monkeypatch):
    outcomes = [outcome("HBAT", 0.8)]
    assert draw_trade_off(outcomes, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("hbat.cli.demo.results.can_draw", lambda: False)
    assert draw_trade_off(outcomes, tmp_path / "b.png") is None
    assert not (tmp_path / "b.png").exists()
