"""Waiting for something that happens soon, or late on a busy machine, but surely."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 600
"""Seconds after which a test gives up; far more than anything here takes on a machine with nothing else to do."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Returns as soon as the condition holds.

    Raises:
        AssertionError: it did not within `PATIENCE`; says what was waited for.
    """
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"still waiting for {what} after {PATIENCE} s"
        time.sleep(0.01)
