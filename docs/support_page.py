"""Writes `docs/support.md`: `python docs/support_page.py docs/support.md`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from support_table import COLUMNS, ENGINES, FEATURES, Cell, Shown, cells

from hbat.engines.refusals import REFUSALS

_HEAD = """# What runs with what

Each combination is either shown by a test, which is named, or refused when the trainer is built, with an error that
says what to use instead. Tests run on a CPU, in one process or in two over gloo; they do not show that a kernel of a
GPU is right. This page is written by `make support` from the table that the checks use (`docs/support_table.py`).
"""


def page() -> str:
    """Write the page.

    Returns:
        Markdown.
    """
    parts = [
        _HEAD,
        "## Engines\n",
        *_engines(),
        "\n## Everything else\n",
        *_features(),
        "\n## Refusals\n",
        *_refusals(),
    ]
    return "\n".join([*parts, "\n## Tests\n", *_tests(), ""])


def _engines() -> list[str]:
    numbers = _numbers()
    head = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return head + [
        f"| {engine} | {' | '.join(_shown(cell, numbers) for cell in row)} |" for engine, row in ENGINES.items()
    ]


def _features() -> list[str]:
    numbers = _numbers()
    return ["| | |", "|---|---|", *(f"| {name} | {_shown(cell, numbers)} |" for name, cell in FEATURES.items())]


def _refusals() -> list[str]:
    written = []
    for name, refusal in REFUSALS.items():
        where = f"by TRL, in {refusal.at[0]}" if refusal.by_trl else f"by {', '.join(refusal.at)}"
        text = refusal.says.replace("{{", "{").replace("}}", "}")
        written.append(f"* **{name}** (`{refusal.kind.__name__}`, {where}): {text}")
    return written


def _tests() -> list[str]:
    return [f"{number}. `tests/{test}`" for test, number in _numbers().items()]


def _numbers() -> dict[str, int]:
    tests = dict.fromkeys(cell.by for cell in cells() if isinstance(cell, Shown))
    return {test: number for number, test in enumerate(tests, 1)}


def _shown(cell: Cell, numbers: dict[str, int]) -> str:
    return f"test {numbers[cell.by]}" if isinstance(cell, Shown) else f"refused: {cell}"


def main(arguments: Sequence[str]) -> None:
    """Write the page to a file.

    Args:
        arguments: The file's path.
    """
    Path(arguments[0]).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
