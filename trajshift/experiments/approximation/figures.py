"""The figures of the approximation error, drawn from `summary`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trajshift.experiments.approximation.measurement_plan import (
    DISPLACEMENT,
    OPTIMIZERS,
    PRESCRIBED,
    MeasurementPlan,
    Setting,
    scale,
)
from trajshift.experiments.approximation.summary import Comparison, Measured, Units, estimate, measured, varied
from trajshift.report.figures import COLOURS, GREY, MARKERS, legend, log_axis, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trajshift.experiments.approximation.quadratic import Check


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index], "marker": MARKERS[index], "ms": 4, "lw": 1.4}


def _line(axis: Axes, x: Sequence[float], values: np.ndarray, label: str, look: dict[str, Any]) -> None:
    """Mean and 95% interval over draws of `values` `[draws, N]`."""
    points = [(place, one) for place, column in zip(x, values.T, strict=True) if (one := estimate(column)) is not None]
    at = [place for place, _ in points]
    means = np.array([one.mean for _, one in points])
    half = np.array([one.half_width or 0.0 for _, one in points])
    axis.plot(at, means, label=label, **look)
    # An interval that reaches zero cannot be drawn on a logarithmic axis: it is cut at a tenth of the mean.
    axis.fill_between(at, np.maximum(means - half, means / 10), means + half, color=look["color"], alpha=0.16, lw=0)


@styled
def error_figure(units: Units, plan: MeasurementPlan, networks: Sequence[str], *, relative: bool) -> Figure:
    """Figure 3: the error against alpha, beta (after the last k) and k; a row for each inner optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 2.35 * len(OPTIMIZERS) + 0.4), layout="constrained")
    axes = figure.subplots(len(OPTIMIZERS), 3, squeeze=False, sharey="row")
    last = plan.ks[-1]
    for row, optimizer in zip(axes, OPTIMIZERS, strict=True):
        alphas = [alpha * scale(optimizer) for alpha in plan.alphas]
        for index, network in enumerate(networks):
            middle = Setting(
                network=network, optimizer=optimizer, shifts=DISPLACEMENT,
                alpha=plan.alpha * scale(optimizer), beta=plan.beta,
            )  # fmt: skip
            panels: list[tuple[Sequence[float], np.ndarray]] = []
            variables: tuple[tuple[str, Sequence[float]], ...] = (("alpha", alphas), ("beta", plan.betas))
            for variable, values in variables:
                found = [measured(units, varied(middle, variable, value), plan) for value in values]
                panels.append((values, np.stack([_chosen(one, relative)[:, -1] for one in found], axis=1)))
            panels.append((plan.ks, _chosen(measured(units, middle, plan), relative)))
            for axis, (x, errors) in zip(row, panels, strict=True):
                _line(axis, x, errors, network, _look(index))
        what = "relative error" if relative else "error"
        row[0].set_ylabel(f"{optimizer}\n{what}")
        middle_alpha = plan.alpha * scale(optimizer)
        titles = (
            f"inner learning rate alpha\n(beta {plan.beta:g}, k {last})",
            f"meta-learning rate beta\n(alpha {middle_alpha:g}, k {last})",
            f"trajectory length k\n(alpha {middle_alpha:g}, beta {plan.beta:g})",
        )
        for axis, title, places in zip(row, titles, (alphas, plan.betas, plan.ks), strict=True):
            axis.set(yscale="log", xlabel=title)
            log_axis(axis, places)
    legend(figure, list(axes.flat))
    return figure


def _chosen(one: Measured, relative: bool) -> np.ndarray:
    return one.relative if relative else one.error


@styled
def order_figure(units: Units, plan: MeasurementPlan, networks: Sequence[str], checks: Sequence[Check]) -> Figure:
    """Error against k for plain SGD at the smallest alpha beside equation 5, and the quadratics' closed form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 3.3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, shifts, order in zip(axes, (PRESCRIBED, DISPLACEMENT), (2, 3), strict=False):
        for index, network in enumerate(networks):
            point = Setting(network=network, optimizer="SGD", shifts=shifts, alpha=plan.alphas[0], beta=plan.beta)
            one = measured(units, point, plan)
            _line(axis, plan.ks, one.error, network, _look(index))
        # The line of the predicted slope goes through the last network's first point.
        anchor = np.nanmean(one.error[:, 0]) / _sum_of_powers(plan.ks[0], order)
        axis.plot(
            plan.ks, [anchor * _sum_of_powers(k, order) for k in plan.ks],
            "--", color=GREY, lw=1.1, label="order of equation 5", zorder=1,
        )  # fmt: skip
        axis.set_title(f"{shifts} shifts: order $k^{order}$")
        axis.set(yscale="log", xlabel="k")
        log_axis(axis, plan.ks)
    axes[0].set_ylabel(f"error, plain SGD, alpha {plan.alphas[0]:g}")
    for index, check in enumerate(checks):
        look = {"color": COLOURS[2 + index], "label": f"quadratics, momentum {check.momentum:g} (line: closed form)"}
        axes[2].plot(np.arange(2, check.horizon + 1), check.exact, color=COLOURS[2 + index], lw=1.2)
        axes[2].plot(check.ks, check.measured, MARKERS[2 + index], ms=4, **look)
    axes[2].set_title("quadratics: measured and exact")
    axes[2].set(xscale="log", yscale="log", xlabel="k")
    legend(figure, list(axes))
    return figure


def _sum_of_powers(k: int, order: int) -> float:
    """Sum over i < k of i^(order - 1), to which k^order is proportional for large k only."""
    return float(sum(i ** (order - 1) for i in range(1, k)))


@styled
def shift_figure(found: Sequence[Comparison], networks: Sequence[str]) -> Figure:
    """The error of each estimate of dU_k/dphi over that of the identity, along the same shifts of phi."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    carries = list(dict.fromkeys(one.carry for one in found))
    for axis, network in zip(axes, networks, strict=True):
        for index, carry in enumerate(carries):
            points = [one for one in found if (one.network, one.carry) == (network, carry) and one.ratio is not None]
            ks = [one.k for one in points]
            logs = [one.ratio for one in points if one.ratio is not None]
            look = _look(index)
            axis.plot(ks, [np.exp(one.mean) for one in logs], label=carry, **look)
            low, high = ([np.exp(one.mean + sign * (one.half_width or 0.0)) for one in logs] for sign in (-1.0, 1.0))
            axis.fill_between(ks, low, high, color=look["color"], alpha=0.14, lw=0)
        axis.axhline(1.0, color=GREY, lw=1.0, ls="--")
        axis.set_title(network)
        axis.set(yscale="log", xlabel="k")
        log_axis(axis, sorted({one.k for one in found}))
        axis.set_yticks((0.5, 1.0, 2.0, 4.0, 8.0), ("0.5", "1", "2", "4", "8"))
        axis.minorticks_off()
    axes[0].set_ylabel("error / error of the identity shift")
    legend(figure, list(axes))
    return figure
