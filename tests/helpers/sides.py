"""Sides of a benchmark without a process of their own: what a process adds is tested once, and takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Process, Steps, memory, threads, timed
from trajshift.utils.imports import load_object


class Nearby:
    """`benchmarks.harness.Process` in this process, as one rank."""

    def __init__(self, side: str, options: Mapping[str, Any], *, threads: int) -> None:
        self.start_bytes = self.peak_bytes = 0
        self._side, self._options, self._threads = side, options, threads
        self._steps: Steps | None = None

    def __enter__(self) -> Nearby:
        return self

    def __call__(self, steps: int) -> float:
        if self._steps is None:
            self._steps = load_object(self._side, "side")(**self._options)
        with threads(self._threads):
            seconds = timed(self._steps)(steps)
        self.peak_bytes = memory("VmHWM")
        return seconds

    def __exit__(self, *error: object) -> None:
        pass


def sides(side: str, options: Mapping[str, Any], *, threads: int = 1, ranks: int = 1) -> Nearby | Process:
    """Stands for `Process`; ranks that talk to each other are real, once for each side."""
    if ranks > 1 and not side.endswith(":alone") and not options["bfloat16"]:
        return Process(side, options, threads=threads, ranks=ranks)
    return Nearby(side, options, threads=threads)
