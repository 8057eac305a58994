"""Tables and lines on standard output."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_WIDEST = 10_000  # characters


class Output(Console):
    """Prints text as it is. A table takes no more than the width of a terminal, and no line of a file is broken."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)
        if not self.is_terminal:
            self.width = _WIDEST

    def table(self, table: Table, title: str = "") -> None:
        """Print a table below its title, which may be wider."""
        if title:
            self.print(title, style="italic")
        if self.measure(table, options=self.options.update_width(_WIDEST)).maximum > self.width:
            for column in table.columns:  # rich would break words of long heads before it breaks short heads
                column.header = str(column.header).replace(" ", "\n")
        self.print(table, soft_wrap=False)


def number_table(*columns: str) -> Table:
    """Make a table with numbers in all columns but the first."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=not index)
    return table
