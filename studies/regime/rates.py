"""How rates are chosen: the rule of results/images, as a function of the scores known so far.

The inner rate is searched first, then the meta-learning rate at the best inner rate. A line of rates begins around its
start and is extended while its best rate is an end. Every method begins with five points: three inner and three
meta-learning rates with one point in common, or five inner rates where there is no meta-learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from studies.regime.setting import METHODS
from trajshift.errors import UsageError, nearest

GRID = tuple(float(f"{digit}e{power}") for power in range(-9, 3) for digit in (1, 2, 5))
"""Three values a decade."""


class Rates(NamedTuple):
    """The two rates of a method; joint training has only the inner one."""

    inner_lr: float
    meta_lr: float | None

    def __str__(self) -> str:
        meta = "" if self.meta_lr is None else f", meta_lr {self.meta_lr:g}"
        return f"inner rate {self.inner_lr:g}{meta}"


START = {
    "trajectory-shifting": Rates(0.02, 0.05),
    "reptile": Rates(0.02, 2.0),
    "mtl": Rates(0.2, None),
    "no-shifting": Rates(0.05, 0.1),
}
"""Where the searches begin: the rates of results/images at 16 pixels, K = 1000 or, where there are none, 200."""

Scores = Mapping[Rates, float]
"""Rates -> accuracy on the tuning task; 0 where training diverged."""


class ScoreMissing(Exception):
    """The search needs the score of these rates."""

    def __init__(self, rates: Rates) -> None:
        super().__init__(str(rates))
        self.rates = rates


def choose(method: str, scores: Scores) -> Rates:
    """The rates that the rule chooses for a method.

    Raises:
        ScoreMissing: names the next rates to try.
    """

    def score(rates: Rates) -> float:
        if rates not in scores:
            raise ScoreMissing(rates)
        return scores[rates]

    start = START[method]
    if start.meta_lr is None:
        return Rates(best_on_line(lambda lr: score(Rates(lr, None)), start.inner_lr, reach=2), None)
    inner_lr = best_on_line(lambda lr: score(Rates(lr, start.meta_lr)), start.inner_lr, reach=1)
    return Rates(inner_lr, best_on_line(lambda lr: score(Rates(inner_lr, lr)), start.meta_lr, reach=1))


def best_on_line(score: Callable[[float], float], start: float, reach: int) -> float:
    """The best rate among `reach` neighbours on both sides of `start`, extended while the best is an end.

    Of equal scores the rate nearest to the start is taken, of two as near the smaller.
    """
    middle = GRID.index(start)
    low, high = max(middle - reach, 0), min(middle + reach, len(GRID) - 1)
    while True:
        best = max(range(low, high + 1), key=lambda place: (score(GRID[place]), -abs(place - middle)))
        if best == low > 0:
            low -= 1
        elif best == high < len(GRID) - 1:
            high += 1
        else:
            return GRID[best]


def parse_rates(words: list[str]) -> dict[str, Rates]:
    """`METHOD=INNER` or `METHOD=INNER,META`, each for one method.

    Raises:
        UsageError: another form, an unknown method, or a number of rates that is not the method's.
    """
    found = {}
    for word in words:
        method, _, numbers = word.partition("=")
        if method not in METHODS:
            raise UsageError(f"rates are given for {method!r}, which is not a method here{nearest(method, METHODS)}")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            values = []
        wanted = 1 if START[method].meta_lr is None else 2
        if len(values) != wanted or not all(0 < value < float("inf") for value in values):
            form = "INNER" if wanted == 1 else "INNER,META"
            raise UsageError(f"rates are {word!r}; write {method}={form} with positive numbers")
        found[method] = Rates(values[0], values[1] if wanted == 2 else None)
    return found
