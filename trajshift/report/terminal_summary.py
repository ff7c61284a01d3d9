"""The comparison of methods on the terminal."""

from __future__ import annotations

from trajshift.evaluation.comparison import Summary
from trajshift.utils.terminal import console, print_table


def print_summary(summary: Summary, *, tests: bool = True) -> None:
    """Print methods x targets with intervals, the paired tests, and what the reader must know."""
    print_table(summary.header(), summary.cells(), summary.title)
    if tests and any(test.t is not None for test in summary.tests):
        print_table(summary.test_header(), summary.test_cells(), "paired t-tests over seeds on the average", text=2)
    for note in summary.notes:
        console().print(f"note: {note}", soft_wrap=True)
