"""Intervals and paired tests over seeds.

A seed is a whole pipeline (start of phi, heads, batches, meta-training, target subset, fine-tuning), so each
seed gives one number here: several targets are averaged within the seed first. Student's t
comes from scipy, imported when the first interval is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from trajshift.errors import UsageError, nearest
from trajshift.utils.imports import missing_report_extra

LEVEL = 0.05
"""Level of the tests, after Holm's correction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with the half width of its t-interval."""

    mean: float
    """In the unit of the values."""
    half_width: float | None
    """`None` where there is no interval: one value alone says nothing about its spread."""
    count: int
    """Number of seeds."""

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


def show(estimate: Estimate | None, digits: int = 3, scale: float = 1.0, *, signed: bool = False) -> str:
    """`1.23 \u00b1 0.45`, both times `scale`; without an interval the mean alone, `-` for none."""
    if estimate is None:
        return "-"
    mean = f"{scale * estimate.mean:{'+' if signed else ''}.{digits}f}"
    return mean if estimate.half_width is None else f"{mean} \u00b1 {scale * estimate.half_width:.{digits}f}"


def show_p(p: float, decimals: int | None = None) -> str:
    """A p-value with two significant digits, or with fixed decimals; below the last of four (of `decimals`) a bound.

    `show_p(0.0123)` is `0.012`, `show_p(1e-6)` is `<0.0001`; `show_p(0.0123, 3)` the same, `show_p(1e-6, 3)` `< 0.001`.
    """
    if decimals is None:
        return "<0.0001" if p < 1e-4 else f"{p:#.2g}"
    least = 10.0**-decimals
    return f"< {least:.{decimals}f}" if p < least else f"{p:.{decimals}f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """Two-sided paired t-test of `first - second` over the seeds that both have."""

    first: str
    second: str
    count: int
    """Seeds that both have."""
    difference: Estimate | None
    """Mean of `first - second` with its uncorrected interval; `None` without a common seed."""
    t: float | None
    """Student's t with `count - 1` degrees of freedom."""
    p: float | None
    """Two-sided, uncorrected."""
    p_holm: float | None
    """Corrected for all tests of its family (`compare`)."""
    reason: str | None
    """Why there is no p, in words."""


def interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean and two-sided t-interval of per-seed values: mean +- t((1 + confidence) / 2, n - 1) * s / sqrt(n).

    With one value the mean comes back without an interval. Raises `UsageError` for no value or one that is
    not finite.
    """
    x = _checked(values)
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence is {confidence}; use a number between 0 and 1, for instance 0.95")
    mean, n = float(np.mean(x)), len(x)
    if n == 1:
        return Estimate(mean=mean, half_width=None, count=1)
    quantile = float(_student_t().ppf(0.5 + confidence / 2, n - 1))
    return Estimate(mean=mean, half_width=quantile * _standard_error(x), count=n)


def paired_test(
    first: Mapping[int, float],
    second: Mapping[int, float],
    names: tuple[str, str] = ("first", "second"),
) -> PairedTest:
    """Two-sided paired t-test between two mappings seed -> value, over the seeds in both.

    Fewer than two common seeds, or equal non-zero differences at every seed, give no p but a `reason`.
    All differences zero give t = 0, p = 1.
    """
    seeds = [seed for seed in first if seed in second]
    base = PairedTest(
        first=names[0],
        second=names[1],
        count=len(seeds),
        difference=None,
        t=None,
        p=None,
        p_holm=None,
        reason=None,
    )
    if not seeds:
        return replace(base, reason="no seed in common")
    differences = _checked([first[seed] - second[seed] for seed in seeds])
    base = replace(base, difference=interval(differences))
    if len(seeds) == 1:
        return replace(base, reason="one seed in common: no test")
    error, mean = _standard_error(differences), float(np.mean(differences))
    if error <= 1e-12 * abs(mean) or error == 0.0:
        if mean == 0.0:
            return replace(base, t=0.0, p=1.0)
        return replace(base, reason="the difference is the same at every seed: no spread to test against")
    t = mean / error
    return replace(base, t=t, p=float(2 * _student_t().sf(abs(t), len(seeds) - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) * p_(j)). Holm (1979).
    """
    p = np.asarray(p_values, dtype=float)
    if np.any(~np.isfinite(p)) or np.any((p < 0) | (p > 1)):
        raise UsageError(f"p-values must lie between 0 and 1, got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    scaled = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled)
    return [float(value) for value in adjusted]


def compare(values: Mapping[str, Mapping[int, float]], reference: str | None = None) -> list[PairedTest]:
    """Paired tests between methods, Holm-corrected as one family.

    `values`: method -> {seed: value}. With a `reference` the family holds that method against each other one,
    without it every pair, in the order of `values`. Pairs that allow no test stay in the list, with their
    reason, and do not count in the correction.
    """
    if reference is not None and reference not in values:
        raise UsageError(f"there is no method {reference!r} to compare with{nearest(reference, values)}")
    pairs: list[tuple[str, str]] = (
        list(combinations(values, 2))
        if reference is None
        else [(reference, other) for other in values if other != reference]
    )
    tests = [paired_test(values[a], values[b], (a, b)) for a, b in pairs]
    corrected = iter(holm([test.p for test in tests if test.p is not None]))
    return [test if test.p is None else replace(test, p_holm=next(corrected)) for test in tests]


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0:
        raise UsageError("an interval needs at least one value per method, got none")
    if not np.all(np.isfinite(x)):
        raise UsageError(f"an interval needs finite values, got {[float(v) for v in x]}")
    return x


def _standard_error(x: np.ndarray) -> float:
    return float(np.std(x, ddof=1)) / math.sqrt(len(x))


def _student_t() -> Any:
    try:
        from scipy.stats import t
    except ImportError:
        raise missing_report_extra("scipy") from None
    return t
