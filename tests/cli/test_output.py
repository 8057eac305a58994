"""Tables on standard output."""

import re

import pytest

from hbat.cli.output import Output, number_table

COLUMNS = ["sft loss", "dpo loss", "rouge rougeL", "completions ended", "pairs accuracy", "texts loss"]


@pytest.fixture
def printed(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def lines(table, *, terminal, title=""):
        monkeypatch.setattr(Output, "is_terminal", terminal)
        Output().table(table, title)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return lines


def table(columns):
    made = number_table("after", *columns)
    made.add_row("round 1: dpo", *["0.1234"] * len(columns))
    return made


def test_a_terminal_of_80_columns_shows_seven_columns_with_whole_words_and_numbers(printed):
    lines = printed(table(COLUMNS), terminal=True)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert words.count("0.1234") == len(COLUMNS)
    assert {word for column in COLUMNS for word in column.split()} <= {*words}


def test_a_file_gets_one_line_for_every_row(printed):
    (row,) = (line for line in printed(table(COLUMNS * 3), terminal=False) if "0.1234" in line)
    assert row.split() == ["round", "1:", "dpo", *["0.1234"] * 18]


def test_text_is_printed_as_it_is(printed):
    made = number_table("[red]", "[/]")
    made.add_row(":smile:", "[x]")
    text = "\n".join(printed(made, terminal=False, title="[bold]"))
    assert all(each in text for each in ("[red]", "[/]", "[bold]", ":smile:", "[x]"))
