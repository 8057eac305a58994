"""Reward functions as a run file names them."""

import math
import sys
import textwrap

import pytest

from hbat.cli.reward_functions import load_reward_functions

FILE = """
    scale = 2.0

    def length(completions, **kwargs):
        return [scale * len(text) for text in completions]
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rewards.py"
    path.write_text(textwrap.dedent(FILE), encoding="utf-8")
    return path


def test_functions_come_from_modules_and_files_and_models_stay_names(file):
    assert load_reward_functions(None) is None
    found = load_reward_functions(["math:fsum", "rewards.py:length", f"{file}:length", "some/model", "./folder"])
    assert found[0] is math.fsum
    assert [function(completions=["ab"]) for function in found[1:3]] == [[4.0], [4.0]]
    assert found[3:] == ["some/model", "./folder"]


def test_modules_of_the_working_folder_and_neighbours_of_a_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "working_rewards.py").write_text("def one(**_): return [1.0]")
    (inner / "neighbour_words.py").write_text("def score(text): return len(text)")
    (inner / "own.py").write_text("from neighbour_words import score")
    monkeypatch.chdir(tmp_path)
    first, second = load_reward_functions(["working_rewards:one", "inner/own.py:score"])
    assert (first(), second("ab")) == ([1.0], 2)


def test_a_single_text_is_a_list_of_one(file):
    (found,) = load_reward_functions("rewards.py:length")
    assert found.__name__ == "length"


REFUSED = [
    ("no_such_module:f", ValueError, r"`reward_funcs`: there is no module 'no_such_module'.*`path/to/file\.py:"),
    ("math:fsun", ValueError, r"`reward_funcs`: math has no `fsun`\. Did you mean `fsum`\?"),
    ("math:pi", TypeError, r"`reward_funcs`: `pi` of math is a float, not a function"),
    ("rewards.py", ValueError, r"'rewards\.py', which names no function or class\. Give `package\.module:function`"),
    ("rewards.py:", ValueError, r"names no function"),
    (":length", ValueError, r"names no function"),
    ("", ValueError, r"names no function"),
    ("reward.py:length", ValueError, r"there is no file .*/reward\.py\. Did you mean `rewards\.py`\?"),
    ("gone/rewards.py:length", ValueError, r"there is no file .*\(and no folder .*/gone\)"),
    ("rewards.py:lenght", ValueError, r"has no `lenght`\. Did you mean `length`\?"),
    ("broken.py:length", ValueError, r"importing .*/broken\.py failed: ZeroDivisionError: "),
]


@pytest.mark.parametrize(("text", "error", "message"), REFUSED)
def test_what_cannot_be_imported_is_named(text, error, message, file):
    (file.parent / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(error, match=message) as caught:
        load_reward_functions(text)
    assert "\n" not in str(caught.value)


def test_the_one_of_several_that_is_wrong_is_named_by_its_place(file):
    with pytest.raises(ValueError, match=r"`reward_funcs\[1\]`: math has no `nothing`"):
        load_reward_functions(["math:fsum", "math:nothing"])
