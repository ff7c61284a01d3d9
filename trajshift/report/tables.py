"""Tables of a report as files: numbers as CSV, for programs; text as Markdown, for papers and issues."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trajshift.evaluation.comparison import AVERAGE, Curve, Summary
from trajshift.evaluation.statistics import Estimate
from trajshift.evaluation.steps_to_match import StepsToMatchTable
from trajshift.report.figures import Series, aligned
from trajshift.utils.files import replace_file
from trajshift.utils.table import Table

Show = Callable[[Estimate | None], str]
"""Mean and interval as text."""


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers in full precision; a missing value is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    replace_file(file, out.getvalue())


def summary_csv(file: Path, summary: Summary) -> None:
    """Method x target: mean and half width of the 95% interval in the metric's own unit (accuracy: 0 to 1)."""
    rows: list[list[Any]] = []
    for line in summary.lines:
        cells: dict[str, Estimate] = dict(line.targets)
        if line.average is not None and len(summary.targets) > 1:
            cells[AVERAGE] = line.average
        rows += [[line.label, name, *_numbers(cell), line.inner_steps] for name, cell in cells.items()]
    write_csv(file, ["method", "target", f"mean_{summary.metric}", "half_width", "seeds", "inner_steps"], rows)


def tests_csv(file: Path, summary: Summary) -> None:
    """The paired tests."""
    header = ["first", "second", "difference", "half_width", "seeds", "t", "p", "p_holm", "reason"]
    rows = []
    for test in summary.tests:
        mean, half, _ = _numbers(test.difference)
        rows.append([test.first, test.second, mean, half, test.count, test.t, test.p, test.p_holm, test.reason])
    write_csv(file, header, rows)


def curves_csv(file: Path, panels: Mapping[str, Sequence[Curve]], x: str, metric: str) -> None:
    """Target x method x place."""
    rows = [
        [curve.label, target, int(place), *_numbers(estimate)]
        for target, found in panels.items()
        for curve in found
        for place, estimate in zip(curve.x, curve.y, strict=True)
    ]
    write_csv(file, ["method", "target", x, f"mean_{metric}", "half_width", "seeds"], rows)


def curves_markdown(file: Path, panels: Mapping[str, Sequence[Curve]], show: Show, caption: str) -> None:
    """A line for every target and method, a column for every place."""
    places = sorted({place for found in panels.values() for curve in found for place in curve.x})
    rows = []
    for target, found in panels.items():
        for curve in found:
            at = dict(zip(curve.x, curve.y, strict=True))
            rows.append([target, curve.label, *(show(at.get(place)) for place in places)])
    table = Table(["target", "method", *(f"{place:,.0f}" for place in places)], rows, caption)
    replace_file(file, table.markdown())


def training_csv(file: Path, panels: Mapping[str, Mapping[str, Sequence[Series]]], quantity: str) -> None:
    """Task x method x place: mean over seeds, the least and the most."""
    rows: list[list[Any]] = []
    for task, by_label in panels.items():
        for label, series in by_label.items():
            x, values = aligned(series)
            columns = (x, values.mean(0), values.min(0), values.max(0))
            rows += [[label, task, *map(float, place), len(values)] for place in zip(*columns, strict=True)]
    write_csv(file, ["method", "task", "inner_steps", f"mean_{quantity}", "least", "most", "seeds"], rows)


def training_markdown(file: Path, panels: Mapping[str, Mapping[str, Sequence[Series]]], caption: str) -> None:
    """A line for every task and method, a column for the mean over seeds in each of ten parts of meta-training."""
    lines: dict[tuple[str, str], dict[float, float]] = {}
    for task, by_label in panels.items():
        for label, series in by_label.items():
            x, values = aligned(series, 10)
            lines[task, label] = dict(zip(x.tolist(), values.mean(0).tolist(), strict=True))
    places = sorted({place for line in lines.values() for place in line})
    rows = [[*names, *(f"{line[x]:.4f}" if x in line else "-" for x in places)] for names, line in lines.items()]
    table = Table(["task", "method", *(f"{place:,.0f}" for place in places)], rows, caption)
    replace_file(file, table.markdown())


def steps_to_match_csv(file: Path, table: StepsToMatchTable) -> None:
    """Target x method: steps, empty where not reached, beside the goal and the reference's budget."""
    rows = [
        [line.label, name, steps, None if steps is None else table.budget / steps, table.goals[name]]
        for line in table.lines
        for name, steps in line.steps.items()
    ]
    write_csv(file, ["method", "target", "inner_steps", "times_fewer", "goal"], rows)


def _numbers(estimate: Estimate | None) -> tuple[float | None, float | None, int | None]:
    return (None, None, None) if estimate is None else (estimate.mean, estimate.half_width, estimate.count)
