"""The figures of a report, drawn with matplotlib from summaries and curves, without global state."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trajshift.evaluation.comparison import AVERAGE, Curve, Summary
from trajshift.evaluation.evaluation_row import INITIAL_WEIGHTS, SCRATCH, UNTRAINED_LABELS
from trajshift.evaluation.statistics import Estimate
from trajshift.utils.files import replace_file
from trajshift.utils.imports import missing_report_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): distinguishable with any colour vision and, with the markers, in grey print. Yellow is left
# out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"
_BINS = 150
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "figure.dpi": 150,
}

Looks = Mapping[str, Mapping[str, Any]]


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method, the same in every figure; without meta-training grey and dashed."""
    found: dict[str, dict[str, Any]] = {}
    for index, label in enumerate(name for name in labels if name not in UNTRAINED_LABELS):
        turn = index // len(COLOURS)
        found[label] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": ("-", "--", ":")[turn % 3],
        }
    found[SCRATCH.kind] = {"color": GREY, "marker": "x", "linestyle": "--"}
    found[INITIAL_WEIGHTS.kind] = {"color": GREY, "marker": "+", "linestyle": "-."}
    return found


_Drawing = TypeVar("_Drawing", bound=Callable[..., Any])


def styled(draw: _Drawing) -> _Drawing:
    """Runs a drawing function under `_STYLE`, and says what to install where matplotlib is missing."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        try:
            import matplotlib
        except ImportError:
            raise missing_report_extra("matplotlib") from None
        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **options)

    return drawn  # type: ignore[return-value]


@styled
def comparison_figure(summary: Summary, styles: Looks) -> Figure:
    """Per target and on average: mean and 95% interval of each method; dots are the seeds behind the average."""
    average = len(summary.targets) > 1
    names = [*summary.targets, *([AVERAGE] if average else [])]
    lines = list(reversed(summary.lines))
    figure, axes = _grid(len(names), height=0.75 + 0.27 * len(lines), sharey=True)
    scale = 100.0 if summary.percent else 1.0
    for axis, name in zip(axes, names, strict=True):
        for place, line in enumerate(lines):
            is_average = average and name == names[-1]
            estimate = line.average if is_average else line.targets.get(name)
            if is_average or not average:
                values = [scale * value for value in line.per_seed.values()]
                axis.plot(values, [place - 0.28] * len(values), ".", color=styles[line.label]["color"], alpha=0.6, ms=4)
            if estimate is not None:
                _dot(axis, estimate, place, scale, styles[line.label])
        axis.set_title(name)
        axis.set_ylim(-0.6, len(lines) - 0.4)
        axis.set_yticks(range(len(lines)), [line.label for line in lines])
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(_unit(summary.metric))
        axis.margins(x=0.12)
    return figure


@styled
def curve_figure(
    panels: Mapping[str, Sequence[Curve]],
    styles: Looks,
    *,
    metric: str,
    xlabel: str,
    ylabel: str | None = None,
    levels: Mapping[str, Mapping[str, Estimate]] | None = None,
    log: bool = False,
) -> Figure:
    """One panel per target: the metric against x with 95% bands; `levels`: panel -> label -> a level line."""
    figure, axes = _grid(len(panels), height=2.4)
    scale = 100.0 if metric == "accuracy" else 1.0
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        for label, level in (levels or {}).get(name, {}).items():
            _level(axis, level, scale, label, styles[label])
        for curve in found:
            style = styles[curve.label]
            y = scale * np.array([point.mean for point in curve.y])
            half = scale * np.array([point.half_width or 0.0 for point in curve.y])
            axis.plot(curve.x, y, label=curve.label, ms=4, lw=1.5, **style)
            axis.fill_between(curve.x, y - half, y + half, color=style["color"], alpha=0.14, lw=0)
        if log:
            log_axis(axis, sorted({x for curve in found for x in curve.x}))
        else:
            axis.set_xlim(left=0)
        axis.set_title(name)
        axis.set_xlabel(xlabel)
    for axis in axes[:: _columns(len(panels))]:
        axis.set_ylabel(ylabel or _unit(metric))
    legend(figure, axes)
    return figure


Series = tuple[Sequence[float], Sequence[float]]


@styled
def training_figure(panels: Mapping[str, Mapping[str, Sequence[Series]]], styles: Looks, *, ylabel: str) -> Figure:
    """One panel per task: a quantity logged in training against inner steps, a line per method.

    `panels`: task -> label -> one `(inner steps, values)` per seed. Long series are averaged in bins; with
    several seeds the line is their mean and the band their range.
    """
    figure, axes = _grid(len(panels), height=1.9, sharex=True)
    for axis, (name, by_label) in zip(axes, panels.items(), strict=True):
        for label, runs in by_label.items():
            style = {key: value for key, value in styles[label].items() if key != "marker"}
            x, values = aligned(runs)
            axis.plot(x, values.mean(0), label=label, lw=1.3, **style)
            if len(values) > 1:
                axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.14, lw=0)
        axis.set_title(name)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=4)
    columns = _columns(len(panels))
    for index, axis in enumerate(axes):
        if index % columns == 0:
            axis.set_ylabel(ylabel)
        if index + columns >= len(axes):
            axis.set_xlabel("inner steps per task")
            axis.tick_params(labelbottom=True)
    legend(figure, axes)
    return figure


def save(figure: Figure, name: str, folder: Path) -> str:
    """Writes `folder/name.svg` and `folder/name.png` (150 dots per inch); returns the SVG element for a page.

    The same figure gives the same bytes: no date, and identifiers that depend on the name.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        engine = figure.get_layout_engine()
        if engine is not None:  # once is enough for both files
            engine.execute(figure)
            figure.set_layout_engine("none")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    text = svg.getvalue()
    replace_file(folder / f"{name}.svg", text)
    replace_file(folder / f"{name}.png", png.getvalue())
    return text[text.index("<svg") :]


def _columns(count: int) -> int:
    """Panels in a row: at most four, rows as equal as can be."""
    return -(-count // -(-count // 4))


def _grid(count: int, *, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, up to 9.4 inches wide; `height` in inches a row."""
    from matplotlib.figure import Figure

    columns = _columns(count)
    rows = -(-count // columns)
    width = {1: 5.2, 2: 7.0}.get(columns, 9.4)
    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _dot(axis: Axes, estimate: Estimate, place: int, scale: float, style: Mapping[str, Any]) -> None:
    half = None if estimate.half_width is None else scale * estimate.half_width
    axis.errorbar(
        scale * estimate.mean,
        place,
        xerr=half,
        fmt=style["marker"],
        color=style["color"],
        ms=5,
        capsize=2.5,
        lw=1.4,
    )


def _level(axis: Axes, estimate: Estimate, scale: float, label: str, style: Mapping[str, Any]) -> None:
    axis.axhline(scale * estimate.mean, color=style["color"], linestyle=style["linestyle"], lw=1.2, label=label)
    if estimate.low is not None and estimate.high is not None:
        axis.axhspan(scale * estimate.low, scale * estimate.high, color=style["color"], alpha=0.1, lw=0)


def log_axis(axis: Axes, places: Sequence[float]) -> None:
    """A logarithmic x axis whose ticks are at most six of the places."""
    axis.set_xscale("log")
    shown = places if len(places) <= 6 else places[:: -(-len(places) // 6)]
    axis.set_xticks(shown, [f"{place:g}" for place in shown])
    axis.minorticks_off()


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, what was not meta-trained last."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label in UNTRAINED_LABELS)
    columns = max(1, min(len(labels), 110 // (8 + max(map(len, labels), default=0))))
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=columns, frameon=False
    )


def _unit(metric: str) -> str:
    return "test accuracy in %" if metric == "accuracy" else f"test {metric}"


def aligned(runs: Sequence[Series], bins: int = _BINS) -> tuple[np.ndarray, np.ndarray]:
    """Common `x` `[N]` and values `[runs, N]`: as they are if short and equal, else means in up to `bins` bins."""
    first = np.asarray(runs[0][0], dtype=float)
    if len(first) <= bins and all(np.array_equal(first, x) for x, _ in runs):
        return first, np.array([y for _, y in runs], dtype=float)
    end = min(max(x) for x, _ in runs)
    edges = np.linspace(0, end, bins + 1)
    means = np.full((len(runs), bins), np.nan)
    for row, (x, y) in zip(means, runs, strict=True):
        places = np.clip(np.searchsorted(edges, np.asarray(x, dtype=float)) - 1, 0, bins - 1)
        inside = np.asarray(x) <= end
        counts = np.bincount(places[inside], minlength=bins)
        sums = np.bincount(places[inside], weights=np.asarray(y, dtype=float)[inside], minlength=bins)
        row[counts > 0] = sums[counts > 0] / counts[counts > 0]
    kept = ~np.isnan(means).any(0)
    return ((edges[1:] + edges[:-1]) / 2)[kept], means[:, kept]
