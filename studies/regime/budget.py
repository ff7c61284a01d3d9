"""The minutes of a loan, and how long a piece of work takes, judged by what the same device took before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MARGIN = 1.05
"""Factor on the measured time."""


class Budget:
    """The time left of a command."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60.0 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def fits(self, seconds: float | None) -> bool:
        """Whether work of this length may begin; None is a length not known yet: true while any time is left."""
        return self.left() > MARGIN * (seconds or 0.0)


def run_seconds(rows: Iterable[Mapping[str, Any]], steps: int, **wanted: Any) -> float | None:
    """What a meta-training of so many steps takes, by the latest like it; None if there is none.

    Args:
        rows: of runs.jsonl and tuning.jsonl; rows of diverged runs have no times.
        steps: inner steps.
        wanted: `size`, `device` and `method`. Without a row of the method the slowest of the other methods counts.
    """
    latest: dict[str, float] = {}
    for row in rows:
        alike = all(row[name] == wanted[name] for name in ("size", "device"))
        if alike and "step_seconds" in row:
            latest[row["method"]] = row["set_up_seconds"] + steps * row["step_seconds"]
    return latest.get(wanted["method"], max(latest.values(), default=None))


def trial_seconds(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> float | None:
    """What one pair of rates takes to try, fine-tunings included: as the latest on the same `device` at this `size`."""
    found = [row["trial_seconds"] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found[-1] if found else None
