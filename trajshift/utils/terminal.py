"""Tables on the terminal; torch-free."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from trajshift.evaluation.comparison import Summary

PLAIN_WIDTH = 160
"""Columns of the output where it is no terminal."""


def console() -> Console:
    """Where results go: stdout, wide where it is no terminal, so that no cell is broken."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", text: int = 1) -> None:
    """Print a table whose first `text` columns are words and whose others are numbers."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = console()
    if title:
        out.print(f"\n{title}", style="bold", soft_wrap=True)
    out.print(table)


def print_summary(summary: Summary, *, tests: bool = True) -> None:
    """Print methods x targets with intervals, the paired tests, and what the reader must know."""
    print_table(summary.header(), summary.cells(), summary.title)
    if tests and any(test.t is not None for test in summary.tests):
        print_table(summary.test_header(), summary.test_cells(), "paired t-tests over seeds on the average", text=2)
    for note in summary.notes:
        console().print(f"note: {note}", soft_wrap=True)
