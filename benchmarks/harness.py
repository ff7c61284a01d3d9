"""Timing: sides that take steps in turn, and their ratio.

A side is a callable `take(steps) -> seconds`. `timed` makes one of code in this process, `Process` of code in its own
process (or several, started by torchrun), whose threads are fixed and whose peak memory is known.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from trajshift.errors import UsageError
from trajshift.utils.progress import Progress

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Steps = Callable[[int], None]
"""Takes this many steps."""
Take = Callable[[int], float]
"""Takes this many steps and returns the seconds that they took."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its 95% interval."""

    median: float
    low: float
    high: float
    count: int

    def times(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(factor * self.median, factor * self.low, factor * self.high, self.count)

    def above_one(self) -> Spread:
        """A ratio as the percentage above one."""
        return Spread(100 * (self.median - 1), 100 * (self.low - 1), 100 * (self.high - 1), self.count)


def once(value: float) -> Spread:
    """A value that was measured once."""
    return Spread(value, value, value, 1)


def spread(values: Sequence[float]) -> Spread:
    """The median and its interval by order statistics, whatever the distribution; with fewer than 6 values the range.

    The j-th smallest and largest enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < j).
    """
    ordered, count = sorted(values), len(values)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    outside, j = 1.0, 0
    while outside <= 0.025 * 2**count:
        j += 1
        outside += comb(count, j)
    j = max(j - 1, 0)
    return Spread(middle, ordered[j], ordered[count - 1 - j], count)


def ratio(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Spread of `first / second`, neighbour by neighbour."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


def interleave(
    sides: Mapping[str, Take], *, steps: int | Mapping[str, int], rounds: int, warmup: int = 1, title: str
) -> dict[str, list[float]]:
    """Seconds per step of every side in every round; in a round each side takes its `steps` once, in order.

    The `warmup` first blocks of each side are not counted.
    """
    count = {name: steps if isinstance(steps, int) else steps[name] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with Progress(title, warmup + rounds) as progress:
        for turn in range(warmup + rounds):
            for name, take in sides.items():
                spent = take(count[name]) / count[name]
                if turn >= warmup:
                    seconds[name].append(spent)
            progress.update(turn + 1)
    return seconds


def repeated(step: Callable[[], object]) -> Steps:
    """One step as `Steps`."""

    def take(count: int) -> None:
        for _ in range(count):
            step()

    return take


def timed(steps: Steps, device: torch.device | str = "cpu") -> Take:
    """A side of code in this process; on a GPU the clock stops when the device is done."""

    def take(count: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        steps(count)
        synchronize(device)
        return time.perf_counter() - began

    return take


def synchronize(device: torch.device | str) -> None:
    """Waits for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs a block with this many threads for each operation of PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS`, resident now, or `VmHWM`, the peak so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UsageError(f"this system does not report {field} of a process; memory is measured on Linux")


class SideFailed(RuntimeError):
    """A side in its own process stopped with an error; its text is the error's."""


class Process:
    """A side in its own process, or one in each of `ranks` processes that torchrun starts; use it in a `with`.

    The processes sleep while they have no step to take. Those entered one after another start at the same time.

    Args:
        side: `package.module:function`; `function(**options)` returns the `Steps`.
        options: JSON values.
        threads: of each process.
        ranks: processes; a block takes as long as the slowest.
    """

    def __init__(self, side: str, options: Mapping[str, Any], *, threads: int = 1, ranks: int = 1) -> None:
        self.start_bytes = 0
        """Resident in the largest process before the side was built."""
        self.peak_bytes = 0
        """The most that was ever resident in the largest process."""
        self._arguments = [side, json.dumps(options)]
        self._threads = threads
        self._ranks = ranks
        self._streams: list[TextIO] = []

    def __enter__(self) -> Process:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(self._ranks)
        self._listener.settimeout(0.1)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._ranks}"]
        command = [
            sys.executable, *(torchrun if self._ranks > 1 else ()),
            "-m", "benchmarks.worker", str(folder / "socket"), *self._arguments,
        ]  # fmt: skip
        self._log = folder / "log"
        with self._log.open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
            self._child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return self

    def __call__(self, steps: int) -> float:
        """Takes this many steps in every process; returns the seconds of the slowest.

        Raises:
            SideFailed: a process stopped; says why.
        """
        if not self._streams:
            self._connect()
        for stream in self._streams:
            print(steps, file=stream, flush=True)
        answers = [self._read(stream) for stream in self._streams]
        self.peak_bytes = max(int(answer["peak"]) for answer in answers)
        return max(float(answer["seconds"]) for answer in answers)

    def _connect(self) -> None:
        while len(self._streams) < self._ranks:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._child.poll() is not None:
                    raise self._failure() from None
                continue
            connection.settimeout(None)
            self._streams.append(connection.makefile("rw"))
            connection.close()  # the stream holds it open
        self.start_bytes = max(int(self._read(stream)["resident"]) for stream in self._streams)

    def _read(self, stream: TextIO) -> dict[str, Any]:
        line = stream.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer

    def _failure(self) -> SideFailed:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return SideFailed(said[-1] if said else "its process died without a message, perhaps because memory ran out")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()  # the workers read the end of their input, and end
        self._listener.close()
        if not self._streams or kind is not None:
            self._child.terminate()
        self._child.wait()
        self._folder.cleanup()
