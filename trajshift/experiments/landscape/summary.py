"""Turns the quality of single starts into one number per set of tasks, and those into intervals and tests.

A set of tasks is the unit: starts on the same tasks are not independent draws, so they are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trajshift.evaluation.statistics import LEVEL, Estimate, PairedTest, holm, interval, paired_test, show_p

PerSet = dict[str, dict[int, float]]
"""Method -> set -> number."""
Array = np.ndarray
OURS, ACCURATE, REPTILE = "trajectory-shifting", "accurate", "reptile"
PAIRS = (
    (OURS, REPTILE),
    (ACCURATE, REPTILE),
    ("no-shifting", REPTILE),
    ("random-shifting", REPTILE),
    (ACCURATE, OURS),
    (OURS, "no-shifting"),
    (OURS, "random-shifting"),
    (OURS, "leap"),
    (OURS, "fomaml"),
)
"""Comparisons that are tested, fixed in advance."""


def family(tests: Sequence[PairedTest]) -> dict[tuple[str, str], PairedTest]:
    """The tests by pair, corrected by Holm; those without a p do not count."""
    corrected = iter(holm([test.p for test in tests if test.p is not None]))
    return {
        (test.first, test.second): test if test.p is None else replace(test, p_holm=next(corrected)) for test in tests
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All methods at one budget."""

    mean: PerSet
    """Mean final quality over all starts; overflow counts as the worst of the domain, and so does what is worse."""
    median: PerSet
    """Median over all starts; overflow is worse than any number."""
    good: PerSet
    """Percentage of all starts that end in the best tenth of the domain."""
    starts: int
    """Starts of all sets together."""

    def estimates(self, measure: str) -> dict[str, Estimate]:
        """Mean and 95% interval over sets, by method."""
        return {method: interval(list(values.values())) for method, values in getattr(self, measure).items()}

    def tests(self, measure: str) -> dict[tuple[str, str], PairedTest]:
        """Paired over sets, `PAIRS` as one Holm family."""
        values: PerSet = getattr(self, measure)
        return family([paired_test(values[first], values[second], (first, second)) for first, second in PAIRS])


def compared(quality: Mapping[str, Array], yardsticks: Array) -> Comparison:
    """Methods with quality `[S, N]` each, not finite where a start overflowed; `yardsticks` `[2, S]`: good, worst."""
    good, worst = yardsticks[:, :, None]
    with_worst = {method: np.where(np.isfinite(q), q, np.inf) for method, q in quality.items()}

    def by_set(values: Sequence[float]) -> dict[int, float]:
        return {index: float(value) for index, value in enumerate(values)}

    return Comparison(
        mean={m: by_set(np.minimum(q, worst).mean(1)) for m, q in with_worst.items()},
        median={m: by_set([float(np.median(row)) for row in q]) for m, q in with_worst.items()},
        good={m: by_set(100.0 * (q <= good).mean(1)) for m, q in with_worst.items()},
        starts=next(iter(quality.values())).size,
    )


def show_corrected_p(test: PairedTest) -> str:
    """The corrected p, or why there is none."""
    return test.reason or "-" if test.p_holm is None else show_p(test.p_holm, 3)


def lower(test: PairedTest) -> bool | None:
    """Whether the first is lower than the second (True), higher (False), or neither is shown (None)."""
    if test.p_holm is None or test.difference is None or test.p_holm >= LEVEL:
        return None
    return test.difference.mean < 0.0
