"""Turns the saved units into numbers with intervals: errors, slopes against equation 5, shifts compared.

The unit of every statistic is the draw; tasks are averaged within it. Arrays: `[draws, ks]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajshift.evaluation.statistics import Estimate, holm, interval, paired_test
from trajshift.experiments.approximation.measurement_plan import (
    DISPLACEMENT,
    PRESCRIBED,
    MeasurementPlan,
    Setting,
    key_of,
    scale,
)

SMALL = 0.1
"""Equation 5 requires alpha h k far below 1: slopes that it predicts are fitted where it is at most this."""
FIRST_K = 10
"""Slopes in k are fitted from this k on: sums over i < k are powers of k only for k well above 1."""
SLOPE_K = 20
"""Where the slopes in alpha and beta are fitted."""
ORDERS = {PRESCRIBED: {"k": 2, "alpha": 1, "beta": 1}, DISPLACEMENT: {"k": 3, "alpha": 2, "beta": 1}}
"""What equation 5 predicts for plain SGD."""

CORRECTED = 10
"""Shifts that use Hessian-vector products are the identity up to this k (`shifts.EVERY`)."""

Units = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """All draws of one setting."""

    setting: Setting
    error: np.ndarray
    """Mean over tasks of ||U_k - theta_k||, NaN where a trajectory overflowed."""
    relative: np.ndarray
    """Mean over tasks of the same divided by ||theta_k - phi||."""
    curvature: float
    """Norm of the Hessian at the start, the mean over draws."""


def measured(units: Units, setting: Setting, plan: MeasurementPlan) -> Measured:
    """Puts the readings of a setting together."""
    errors, relatives, curvatures = [], [], []
    for draw in range(plan.draws):
        unit = units[key_of(setting, draw)]
        table = np.full((2, len(plan.ks), len({row["task"] for row in unit["readings"]})), np.nan)
        seen = dict.fromkeys(plan.ks, 0)
        for row in unit["readings"]:
            error, distance = (np.nan if row[name] is None else row[name] for name in ("error", "distance"))
            table[:, plan.ks.index(row["k"]), seen[row["k"]]] = error, error / distance if distance else np.nan
            seen[row["k"]] += 1
        errors.append(table[0].mean(1))
        relatives.append(table[1].mean(1))
        curvatures.append(np.nan if unit["curvature"] is None else unit["curvature"])
    return Measured(setting, np.array(errors), np.array(relatives), float(np.nanmean(curvatures)))


def varied(setting: Setting, variable: str, value: float) -> Setting:
    """The setting with another `alpha` or `beta`."""
    return replace(setting, alpha=value) if variable == "alpha" else replace(setting, beta=value)


def estimate(values: np.ndarray) -> Estimate | None:
    """Mean and 95% interval over the draws that did not overflow."""
    kept = values[np.isfinite(values)]
    return interval(kept) if len(kept) else None


@dataclass(frozen=True, slots=True)
class Slope:
    """The exponent of one variable in one kind of run."""

    network: str
    optimizer: str
    shifts: str
    variable: str
    """`k`, `alpha` or `beta`; `k, middle alpha` is k at the published learning rate, outside the regime."""
    measured: Estimate | None
    """None where fewer than two points are in the regime."""
    predicted: int | None
    """None where equation 5 claims no order: momentum, Adam, and outside the regime."""
    points: tuple[float, ...]
    """Where it was fitted."""


def slopes(units: Units, plan: MeasurementPlan, networks: Sequence[str]) -> list[Slope]:
    """Fitted exponents for every network, optimizer and kind of shifts.

    In k at the smallest alpha of the plan, in alpha and beta at k = `SLOPE_K`, all where alpha h k is at most `SMALL`.
    """
    found = []
    at = max(place for place, k in enumerate(plan.ks) if k <= SLOPE_K)
    late = [place for place, k in enumerate(plan.ks) if k >= FIRST_K]
    for middle in _middles(plan, networks):
        alphas = [alpha * scale(middle.optimizer) for alpha in plan.alphas]
        h = measured(units, middle, plan).curvature
        slowest = varied(middle, "alpha", alphas[0])
        series: dict[str, tuple[list[float], list[np.ndarray]]] = {
            "k": _along_k(units, slowest, plan, [place for place in late if alphas[0] * h * plan.ks[place] <= SMALL]),
            "k, middle alpha": _along_k(units, middle, plan, late),
            "alpha": _along(
                units, middle, plan, "alpha", [alpha for alpha in alphas if alpha * h * plan.ks[at] <= SMALL], at
            ),
            "beta": _along(units, middle, plan, "beta", plan.betas, at),
        }
        predicted = ORDERS[middle.shifts] if middle.optimizer == "SGD" else {}
        for variable, (x, errors) in series.items():
            found.append(
                Slope(
                    middle.network, middle.optimizer, middle.shifts, variable,
                    _fit(x, errors), predicted.get(variable), tuple(x),
                )
            )  # fmt: skip
    return found


def _along_k(
    units: Units, setting: Setting, plan: MeasurementPlan, places: Sequence[int]
) -> tuple[list[float], list[np.ndarray]]:
    """k and the errors of all draws there."""
    error = measured(units, setting, plan).error
    return [float(plan.ks[place]) for place in places], [error[:, place] for place in places]


def _along(
    units: Units, middle: Setting, plan: MeasurementPlan, variable: str, values: Sequence[float], at: int
) -> tuple[list[float], list[np.ndarray]]:
    """Values of alpha or beta and the errors of all draws there, after `plan.ks[at]` steps."""
    return list(values), [measured(units, varied(middle, variable, value), plan).error[:, at] for value in values]


def _middles(plan: MeasurementPlan, networks: Sequence[str]) -> list[Setting]:
    """The setting at the middle of both grids, for each line of the figure."""
    return [
        point
        for point in plan.settings(networks)
        if point.shifts in ORDERS and point.alpha == plan.alpha * scale(point.optimizer) and point.beta == plan.beta
    ]


def _fit(x: Sequence[float], errors: Sequence[np.ndarray]) -> Estimate | None:
    """Least squares of log error on log x, draw by draw; draws that overflowed are left out."""
    if len(x) < 2:
        return None
    columns = np.stack(errors, axis=1)
    whole = columns[np.all(np.isfinite(columns) & (columns > 0.0), axis=1)]
    return interval(np.polyfit(np.log(x), np.log(whole).T, 1)[0]) if len(whole) else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A shift against the identity, along the same shifts of phi."""

    network: str
    carry: str
    k: int
    ratio: Estimate | None
    """Of the errors; the mean over draws of the logarithm, with its interval, in natural logarithms."""
    p: float | None
    """Paired t-test of the logarithms, corrected by Holm over all comparisons."""


def comparisons(units: Units, plan: MeasurementPlan, networks: Sequence[str]) -> list[Comparison]:
    """All carries against `shift` at every k after the first Hessian-vector product."""
    found = []
    for network in networks:
        recorded = {
            point.carry: np.log(measured(units, point, plan).error)
            for point in plan.settings([network])
            if point.shifts == "recorded"
        }
        for carry, logs in recorded.items():
            for place, k in enumerate(plan.ks):
                if carry != "shift" and k > CORRECTED:
                    both = np.isfinite(logs[:, place]) & np.isfinite(recorded["shift"][:, place])
                    mine, yours = (dict(enumerate(x[both, place])) for x in (logs, recorded["shift"]))
                    test = paired_test(mine, yours)
                    found.append(Comparison(network, carry, k, test.difference, test.p))
    corrected = iter(holm([one.p for one in found if one.p is not None]))
    return [one if one.p is None else replace(one, p=next(corrected)) for one in found]
