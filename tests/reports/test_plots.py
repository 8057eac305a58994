import builtins
import importlib.util
import logging
import math
import struct
import sys

import pytest
from matrices import TWO_ROUNDS, matrix

from hbat.reports.front import Front
from hbat.reports.plots import can_draw, draw_front, draw_matrix

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def hidden(monkeypatch):
    """Make matplotlib absent."""
    find_spec, real_import = importlib.util.find_spec, builtins.__import__

    def without(name, *args, **kwargs):
        return None if name.split(".")[0] == "matplotlib" else find_spec(name, *args, **kwargs)

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(builtins, "__import__", refuse)


def size(file):
    """Width and height of a PNG, read from its header."""
    content = file.read_bytes()
    assert content.startswith(PNG)
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


CASES = {
    "two rounds": TWO_ROUNDS,
    "one stage": TWO_ROUNDS[1:2],
    "only the start": TWO_ROUNDS[:1],
    "one objective": [(name, {"sft": losses["sft"]}) for name, losses in TWO_ROUNDS],
    "missing values": [(None, {}), ("sft", {"sft": 1.0}), ("dpo", {"dpo": 2.0}), ("sft", {})],
    "not a number": [("sft", {"sft": math.nan, "dpo": math.inf}), ("dpo", {"sft": 1.0, "dpo": 2.0})],
    "equal values": [("sft", {"sft": 1.0, "dpo": 1.0})] * 3,
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_a_picture_is_written_whatever_the_scores(rows, tmp_path):
    pytest.importorskip("matplotlib")
    draw_matrix(matrix(*rows), tmp_path / "evaluation.png")
    width, height = size(tmp_path / "evaluation.png")
    assert min(width, height) > 100


def test_a_longer_run_has_a_wider_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw_matrix(matrix(*TWO_ROUNDS), tmp_path / "short.png")
    draw_matrix(matrix(*TWO_ROUNDS * 3), tmp_path / "long.png")
    assert size(tmp_path / "long.png")[0] > size(tmp_path / "short.png")[0]


def test_drawing_leaves_no_figure_open(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    draw_matrix(matrix(*TWO_ROUNDS), tmp_path / "evaluation.png")
    assert pyplot.get_fignums() == before


def front(*rows):
    """A front from the losses of its objectives by name, at even distances."""
    found = Front(dict.fromkeys(rows[0], "loss"))
    for index, losses in enumerate(rows):
        found.add(index / len(rows), {name: {"loss": loss} for name, loss in losses.items()})
    return found


FRONTS = {
    "a line": [{"sft": 1.0, "dpo": 2.0}, {"sft": 2.0, "dpo": 1.0}],
    "one point": [{"sft": 1.0, "dpo": 2.0}],
    "equal scores": [{"sft": 1.0, "dpo": 2.0}] * 3,
    "not a number": [{"sft": math.nan, "dpo": 2.0}, {"sft": 2.0, "dpo": math.inf}],
    "missing": [{"sft": 1.0, "dpo": 2.0}, {"sft": 1.0}],
}


@pytest.mark.parametrize("rows", FRONTS.values(), ids=FRONTS)
def test_a_front_is_drawn_whatever_the_scores(rows, tmp_path):
    pytest.importorskip("matplotlib")
    draw_front(front(*rows), tmp_path / "front.png")
    assert min(size(tmp_path / "front.png")) > 100


def test_every_two_objectives_have_a_picture_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    draw_front(front({"sft": 1.0, "dpo": 2.0}), tmp_path / "two.png")
    draw_front(front({"sft": 1.0, "dpo": 2.0, "kto": 3.0}), tmp_path / "three.png")
    draw_front(front({"sft": 1.0, "dpo": 2.0, "kto": 3.0, "ppo": 4.0}), tmp_path / "six.png")
    two = size(tmp_path / "two.png")
    assert [size(tmp_path / name) for name in ("three.png", "six.png")] == [
        (3 * two[0], two[1]),
        (3 * two[0], 2 * two[1]),
    ]


def test_without_matplotlib_one_line_says_what_is_missing(hidden, tmp_path, caplog):
    assert not can_draw()
    with caplog.at_level(logging.INFO, logger="hbat.reports.plots"):
        draw_matrix(matrix(*TWO_ROUNDS), tmp_path / "evaluation.png")
        draw_front(front(*FRONTS["a line"]), tmp_path / "front.png")
    assert [record.message for record in caplog.records] == [
        f"matplotlib is not installed, so {name} is not drawn (pip install 'hbat-trl[plots]')."
        for name in ("evaluation.png", "front.png")
    ]
    assert not list(tmp_path.iterdir())
