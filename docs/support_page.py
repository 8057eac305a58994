"""Writes `docs/support.md`: `python docs/support_page.py docs/support.md`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from support_table import COLUMNS, ENGINES, FEATURES, Cell, Shown, cells

from hbat.engines.refusals import REFUSALS

_HEAD = """# What runs with what

Each combination is either shown by a test, which is named, or refused when the trainer is built, with an error that
says what to use instead. The tests run on a CPU, in one process or in two over gloo; they do not show that a GPU's
kernels are right. This page is written by `python docs/support_page.py docs/support.md` from `docs/support_table.py`.
"""


def page() -> str:
    """Write the page, as Markdown."""
    numbers = {test: number for number, test in enumerate(dict.fromkeys(_shown_tests()), 1)}
    return "\n".join([
        _HEAD,
        "## Engines\n",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(f"| {engine} | {' | '.join(_text(cell, numbers) for cell in row)} |" for engine, row in ENGINES.items()),
        "\n## Everything else\n",
        "| | |",
        "|---|---|",
        *(f"| {feature} | {_text(cell, numbers)} |" for feature, cell in FEATURES.items()),
        "\n## Refusals\n",
        *_refusals(),
        "\n## Tests\n",
        *(f"{number}. `tests/{test}`" for test, number in numbers.items()),
        "",
    ])


def _shown_tests() -> list[str]:
    return [cell.by for cell in cells() if isinstance(cell, Shown)]


def _text(cell: Cell, numbers: dict[str, int]) -> str:
    return f"test {numbers[cell.by]}" if isinstance(cell, Shown) else f"refused: {cell}"


def _refusals() -> list[str]:
    lines = []
    for name, refusal in REFUSALS.items():
        where = f"TRL's message, in {refusal.at[0]}" if refusal.by_trl else f"by {', '.join(refusal.at)}"
        text = refusal.says.replace("{{", "{").replace("}}", "}")
        lines.append(f"* **{name}** (`{refusal.kind.__name__}`, {where}): {text}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Write the page to the file that is named first."""
    Path(arguments[0]).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
