"""What a benchmark found, and how it is reported: on the terminal, as JSON, as a dated page, and in the figure."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.figure import Dots, Lines, draw
from benchmarks.harness import Spread
from trajshift.report.figures import save
from trajshift.utils.environment import environment
from trajshift.utils.files import disk_errors, replace_file, write_json
from trajshift.utils.table import Table
from trajshift.utils.terminal import console, print_table

FIGURE = "speed"


@dataclass(frozen=True, slots=True)
class Claim:
    """What must hold, and whether it does."""

    text: str
    measured: Spread
    limit: float
    unit: str = ""
    at_least: bool = False
    """The limit is the lowest allowed, not the highest."""

    @property
    def met(self) -> bool:
        """Whether the median is within the limit."""
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit

    def cells(self) -> list[str]:
        """A row of the table."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"
        return [self.text, show(self.measured, self.unit), bound, "met" if self.met else "missed"]


@dataclass(kw_only=True)
class Report:
    """The findings of one benchmark."""

    title: str
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    panels: list[Dots | Lines] = field(default_factory=list)
    """Its part of the figure."""
    samples: dict[str, Any] = field(default_factory=dict)
    """What was measured, unrounded."""

    def claim_table(self) -> Table:
        """All claims with what was measured."""
        caption = "Medians, in brackets the 95% interval of the median (with fewer than 6 measurements their range)."
        return Table(["claim", "measured", "limit", ""], [claim.cells() for claim in self.claims], caption)

    def all_tables(self) -> list[Table]:
        """The claims, if there are any, and then the details."""
        return [*([self.claim_table()] if self.claims else []), *self.tables]


def show(measured: Spread, unit: str = "") -> str:
    """`1.31 (1.30 to 1.33)` and the unit; a single measurement stands alone."""
    median = f"{measured.median:.3g}"
    if measured.count == 1:
        return median + unit
    return f"{median}{unit} ({measured.low:.3g} to {measured.high:.3g})"


def show_time(seconds: Spread) -> str:
    """A time in the unit that fits it."""
    if seconds.median >= 1.0:
        return show(seconds, " s")
    return show(seconds.times(1e3), " ms") if seconds.median >= 1e-3 else show(seconds.times(1e6), " µs")


def write(name: str, report: Report, folder: Path, *, toy: bool) -> None:
    """Prints the tables and writes NAME.json, NAME-DATE.md and the figure of all benchmarks in the folder."""
    for table in report.all_tables():
        print_table(table.header, table.rows, report.title)
        console().print(table.caption, soft_wrap=True)
    date = time.strftime("%Y-%m-%d")
    about = {
        "benchmark": name,
        "date": date,
        "command": f"python -m benchmarks {name}" + (" --toy" if toy else ""),
        "environment": surroundings(),
    }
    findings = {
        "claims": [{**asdict(claim), "met": claim.met} for claim in report.claims],
        "tables": [asdict(table) for table in report.tables],
        "panels": [asdict(panel) for panel in report.panels],
        "samples": report.samples,
    }
    with disk_errors(folder, option="--out", again="the same command"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", about | findings)
        page = folder / f"{name}-{date}.md"
        replace_file(page, markdown(report, about, toy=toy))
        refresh_figure(folder)
    console().print(f"{page} is written")


def surroundings() -> dict[str, Any]:
    """Versions, hardware and commit; with a GPU also its name and CUDA's version."""
    found = environment()
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def markdown(report: Report, about: dict[str, Any], *, toy: bool) -> str:
    """The dated page."""
    rows = about["environment"] | about["environment"]["packages"]
    del rows["packages"]
    lines = [f"# {report.title}", "", f"    {about['command']}", ""]
    if toy:
        lines += ["At toy size: a check that it runs, not a result.", ""]
    lines += [f"{about['date']}. " + ", ".join(f"{key} {value}" for key, value in rows.items() if value) + ".", ""]
    return "\n".join(lines) + "\n" + "\n".join(table.markdown() for table in report.all_tables())


def refresh_figure(folder: Path) -> None:
    """Draws the panels of all benchmarks that the folder has findings of."""
    found: Sequence[dict[str, Any]] = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    panels = [panel for one in found for panel in one["panels"]]
    if panels:
        save(draw(panels), FIGURE, folder)
