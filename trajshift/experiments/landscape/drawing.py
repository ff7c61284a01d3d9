"""Figures 4 and 5 of the paper, and the comparison over random sets of tasks. Dark is low loss throughout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from trajshift.evaluation.statistics import interval
from trajshift.experiments.landscape.himmelblau import DOMAIN, grid, tasks, template
from trajshift.experiments.landscape.measure import METHODS, STARTS
from trajshift.experiments.landscape.resting import Optima
from trajshift.experiments.landscape.summary import Comparison
from trajshift.report.figures import COLOURS, GREY, MARKERS, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trajshift.experiments.landscape.results import Results

_MINIMA = ((3.0, 2.0), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127))
_RED = "#D55E00"
_MAP = "Greys_r"
_COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#CC79A7", _RED, "#E69F00", "#000000")
_LOOKS: dict[str, dict[str, Any]] = {
    method: {"color": colour, "marker": marker}
    for method, colour, marker in zip(METHODS, _COLOURS, MARKERS, strict=True)
}
_LABELS = {"trajectory-shifting": "trajectory shifting", "accurate": "accurate", "reptile": "Reptile"}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _plane(axis: Axes) -> None:
    """The domain, square, without a grid."""
    axis.set(xlim=DOMAIN, ylim=DOMAIN, xlabel="x", ylabel="y", aspect="equal")
    axis.set_xticks(range(-5, 16, 5))
    axis.set_yticks(range(-5, 16, 5))
    axis.grid(visible=False)


def _contour(axis: Axes, values: np.ndarray, low: float, high: float, span: tuple[float, float] = DOMAIN) -> Any:
    """Filled contours of `[side, side]` on a logarithmic scale, four bands to a factor of ten."""
    from matplotlib.colors import LogNorm

    line = np.linspace(*span, len(values))
    levels = np.geomspace(low, high, round(4 * math.log10(high / low)) + 1)
    shown = np.nan_to_num(values, nan=np.inf).clip(low, high)
    drawn = axis.contourf(line, line, shown, levels, cmap=_MAP, norm=LogNorm(low, high))
    drawn.set_rasterized(True)
    return drawn


def _bar(figure: Figure, drawn: Any, axes: list[Axes], label: str, shrink: float) -> None:
    """A colour bar with a tick at every factor of ten."""
    low, high = drawn.norm.vmin, drawn.norm.vmax
    ticks = 10.0 ** np.arange(math.ceil(math.log10(low) - 1e-9), math.log10(high) + 1e-9)
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, pad=0.02, ticks=list(ticks))
    bar.set_label(label)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()


@styled
def template_figure(results: Results) -> Figure:
    """4(a): the function that every task is a copy of, and its four minima; the square is the domain."""
    from matplotlib.patches import Rectangle

    figure, (axis,) = _figure(3.6, 3.0)
    _plane(axis)
    side, span = results.settings.picture_side, (-10.0, 20.0)
    values = template(grid(side, span)).view(side, side).numpy()
    _bar(figure, _contour(axis, values, 1.0, 1000.0, span), [axis], "loss", 0.9)
    axis.set(xlim=span, ylim=span, xticks=range(-10, 21, 10), yticks=range(-10, 21, 10))
    axis.plot(*(3.0 * np.array(_MINIMA).T + 5.0), "o", color=_RED, mec="white", ms=5)
    low, high = DOMAIN
    axis.add_patch(Rectangle((low, low), high - low, high - low, fill=False, ls="--", ec="black", lw=1.0))
    axis.set_title("(a) template")
    return figure


@styled
def task_figure(results: Results) -> Figure:
    """4(b): the first task; the red dots are the centres of all eight."""
    from matplotlib.patches import Arc

    figure, (axis,) = _figure(3.6, 3.0)
    _plane(axis)
    side, landscape = results.settings.picture_side, tasks()
    values = landscape.losses(grid(side))[0].view(side, side).numpy()
    _bar(figure, _contour(axis, values, 1.0, 1000.0), [axis], "loss", 0.9)
    axis.plot(*landscape.centres.T, "o", color=_RED, mec="white", ms=5)
    x, y = landscape.centres[0].tolist()
    arrow = {"arrowstyle": "-|>", "color": _RED, "lw": 1.6, "shrinkA": 0, "shrinkB": 4}
    axis.annotate("", (x, y), (5.0, 5.0), arrowprops=arrow)
    end = 90.0 - math.degrees(float(landscape.angles[0]))  # a surface turns against its coordinates
    axis.add_patch(Arc((x, y), 4.4, 4.4, theta1=end + 8.0, theta2=90.0, color=_RED, lw=1.6))
    tip, before = (
        (x + 2.2 * math.cos(math.radians(a)), y + 2.2 * math.sin(math.radians(a))) for a in (end, end + 15.0)
    )
    axis.annotate("", tip, before, arrowprops={**arrow, "shrinkB": 0})
    axis.set_title("(b) task 1 of 8")
    return figure


@styled
def bias_figure(results: Results) -> Figure:
    """4(c): quality after K steps of the phi that is best for k."""
    figure, (axis,) = _figure(3.6, 2.7)
    longest = results.settings.horizon
    k = np.arange(longest + 1)
    estimates = [interval(column) for column in results.bias.numpy().T]
    mean = np.array([one.mean for one in estimates])
    half = np.array([one.half_width or 0.0 for one in estimates])
    axis.fill_between(k, np.maximum(mean - half, 1e-3), mean + half, color=COLOURS[0], alpha=0.2, lw=0)
    axis.plot(k, mean, color=COLOURS[0], label=f"mean of {len(results.bias)} random sets, 95%")
    axis.plot(k, results.bias_published, color=GREY, lw=0.9, ls="--", label="published set")
    axis.set(xlabel="k, the steps that phi was chosen for", ylabel=f"loss after {longest} steps", xlim=(0, longest))
    axis.set_yscale("log")
    axis.legend(loc="lower left")
    axis.set_title("(c) short-horizon bias")
    return figure


@styled
def cost_figure(results: Results) -> Figure:
    """4(d): cumulative inner steps against meta-updates."""
    figure, (axis,) = _figure(3.6, 2.7)
    for method, made in results.runs.items():
        steps = made.inner_steps[1:].numpy()
        axis.plot(np.arange(1, len(steps) + 1), steps, color=_LOOKS[method]["color"], lw=1.8)
        axis.annotate(
            f"{_LABELS[method]}: {steps[-1]:,}", (len(steps), steps[-1]), (-4, 5 if method != "accurate" else -17),
            textcoords="offset points", ha="right", color=_LOOKS[method]["color"],
        )  # fmt: skip
    axis.set(xlabel="meta-updates", ylabel="inner steps per task", xlim=(0, None), yscale="log")
    axis.set_ylim(top=2e5)
    axis.set_title("(d) cost")
    return figure


@styled
def optima_figure(results: Results) -> Figure:
    """5(a,b): Reptile's trajectories for a short and a long horizon, and where they rest."""
    figure, axes = _figure(7.2, 3.7, 2)
    for letter, axis, (k, found) in zip("ab", axes, results.optima.items(), strict=True):
        _plane(axis)
        _trajectories_of(axis, found)
        axis.plot(*found.points.T, "o", color=_RED, mec="white", mew=0.4, ms=4.5)
        axis.set_title(f"({letter}) k = {k}: {len(found.points)} points in {found.cluster_count} clusters")
    axes[1].set_ylabel("")
    return figure


def _trajectories_of(axis: Axes, found: Optima) -> None:
    from matplotlib.collections import LineCollection

    lines = LineCollection(list(found.segments.numpy()), colors=COLOURS[0], linewidths=0.25, alpha=0.6)
    lines.set_rasterized(True)
    axis.add_collection(lines)


@styled
def trajectories_figure(results: Results) -> Figure:
    """5(c,d): meta-learning trajectories over the quality of every point."""
    figure, axes = _figure(7.2, 3.8, 2)
    for axis, places, title in zip(
        axes, (range(1), range(1, len(STARTS))), ("(c) one start", "(d) four more"), strict=True
    ):
        _plane(axis)
        drawn = _contour(axis, results.contour.numpy(), 0.03, 100.0)
        for method, made in results.runs.items():
            for place in places:
                _line(axis, made.phi[:, place].numpy(), method, label=place == 0)
        axis.plot(*np.array([STARTS[place] for place in places]).T, "o", mfc="white", mec="black", ms=5, zorder=5)
        axis.set_title(title)
    axes[1].set_ylabel("")
    _bar(figure, drawn, axes, f"loss after {results.settings.horizon} steps", 0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _line(axis: Axes, phi: np.ndarray, method: str, *, label: bool) -> None:
    from matplotlib.patheffects import Normal, Stroke

    look = _LOOKS[method]
    casing = [Stroke(linewidth=3.2, foreground="white"), Normal()]
    axis.plot(
        *phi.T, color=look["color"], lw=1.6, path_effects=casing, label=_LABELS[method] if label else None, zorder=3
    )
    axis.plot(*phi[-1], look["marker"], color=look["color"], mec="white", ms=6.5, zorder=6)


@styled
def comparison_figure(results: Results, quality: dict[str, Comparison]) -> Figure:
    """Final quality and share of good ends of each method at equal budgets; means over random sets, 95% intervals."""
    figure, axes = _figure(7.2, 2.7, 2)
    labels = {"mean": "mean final quality (loss, log scale)", "good": "starts ending in the best tenth, %"}
    for axis, measure in zip(axes, labels, strict=True):
        for shift, (unit, comparison) in zip((0.14, -0.14), quality.items(), strict=True):
            for place, (method, estimate) in enumerate(reversed(comparison.estimates(measure).items())):
                filled = unit == "meta-updates"
                axis.errorbar(
                    estimate.mean, place + shift, xerr=estimate.half_width, fmt=_LOOKS[method]["marker"],
                    color=_LOOKS[method]["color"], mfc=None if filled else "white", ms=5, capsize=2.5, lw=1.3,
                )  # fmt: skip
        axis.set_yticks(range(len(METHODS)), list(reversed(METHODS)) if measure == "mean" else [])
        axis.set_xlabel(labels[measure])
        axis.grid(axis="y", visible=False)
    axes[0].set_xscale("log")
    axes[0].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes[0].minorticks_off()
    amount = results.settings.updates
    axes[0].set_title(f"filled: {amount} meta-updates, open: {amount} inner steps")
    return figure


@styled
def distribution_figure(quality: dict[str, dict[str, np.ndarray]], good: float) -> Figure:
    """Share of all starts of all sets that end at most at a quality, by budget; dotted: the median good end."""
    figure, axes = _figure(9.4, 3.1, len(quality))
    for axis, (name, methods) in zip(axes, quality.items(), strict=True):
        for method, values in methods.items():
            ends = np.sort(values[np.isfinite(values)])
            share = 100.0 * np.arange(1, len(ends) + 1) / values.size
            every = max(1, len(ends) // 500)
            axis.plot(ends[::every], share[::every], color=_LOOKS[method]["color"], lw=1.4, label=method)
        axis.axvline(good, color=GREY, ls=":", lw=1.0)
        axis.set(xscale="log", xlim=(5e-3, 1e2), ylim=(0, 100), xlabel="final quality (loss)")
        axis.set_title(name)
    axes[0].set_ylabel("starts at most there, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
