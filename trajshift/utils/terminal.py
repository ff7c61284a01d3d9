"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

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
