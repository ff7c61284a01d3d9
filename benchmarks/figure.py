"""The figure of all benchmarks: a panel each, drawn from their saved findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trajshift.report.figures import COLOURS, MARKERS, log_axis, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Dot:
    """A measurement with its interval, and the limit it is compared with."""

    label: str
    median: float
    low: float
    high: float
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Dots:
    """A panel of measurements below each other."""

    title: str
    xlabel: str
    dots: Sequence[Dot]


@dataclass(frozen=True, slots=True)
class Lines:
    """A panel of curves on logarithmic axes."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """Label -> points (x, y)."""


@styled
def draw(panels: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure, from panels as JSON values."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 2.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes, panels, strict=False):
        _dots(axis, panel) if "dots" in panel else _lines(axis, panel)
        axis.set_title(panel["title"])
        axis.set_xlabel(panel["xlabel"])
    return figure


def _dots(axis: Axes, panel: Mapping[str, Any]) -> None:
    dots = panel["dots"][::-1]
    for place, dot in enumerate(dots):
        error = [[dot["median"] - dot["low"]], [dot["high"] - dot["median"]]]
        axis.errorbar(dot["median"], place, xerr=error, fmt="o", color=COLOURS[0], ms=5, capsize=2.5, lw=1.4)
        if dot["limit"] is not None:
            axis.plot([dot["limit"]] * 2, [place - 0.35, place + 0.35], color=COLOURS[1], lw=2)
    axis.set_yticks(range(len(dots)), [dot["label"] for dot in dots])
    axis.set_ylim(-0.6, len(dots) - 0.4)
    axis.grid(axis="y", visible=False)
    if all(dot["low"] >= 0.0 for dot in dots):
        axis.set_xlim(left=0.0)
    if any(dot["limit"] is not None for dot in dots):
        axis.plot([], [], color=COLOURS[1], lw=2, label="limit")
        axis.legend(loc="best")


def _lines(axis: Axes, panel: Mapping[str, Any]) -> None:
    for index, (label, points) in enumerate(panel["lines"].items()):
        x, y = zip(*points, strict=True)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot(x, y, label=label, color=colour, marker=marker, ms=4, lw=1.5)
    log_axis(axis, sorted({x for points in panel["lines"].values() for x, _ in points}))
    axis.set_yscale("log")
    axis.set_ylabel(panel["ylabel"])
    axis.legend(fontsize=7, loc="upper left")
