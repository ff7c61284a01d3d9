"""How experiments tell their numbers: tables and p-values; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trajshift.evaluation.statistics import PairedTest

LEVEL = 0.05
"""Of the tests, after Holm's correction."""


@dataclass(frozen=True, slots=True)
class Table:
    """Header, rows and a caption."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}\n"


def show_p(test: PairedTest) -> str:
    """The corrected p, or why there is none."""
    if test.p_holm is None:
        return test.reason or "-"
    return "< 0.001" if test.p_holm < 0.001 else f"{test.p_holm:.3f}"
