"""Cores, signals, and independent pieces of work in one process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import TYPE_CHECKING, Any

from trajshift.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[Any, ...]
Jobs = dict[Key, Callable[[], Any]]


def run_in_processes(jobs: Jobs, processes: int) -> Iterator[tuple[Key, Any]]:
    """Results in the order of the jobs; one thread for each process, as all pieces are small.

    Raises:
        UsageError: a process died.
        KeyboardInterrupt: SIGINT or SIGTERM; the processes finish the pieces they are working on.
    """
    if processes == 1:
        for key, job in jobs.items():
            yield key, job()
        return
    with ExitStack() as stack:
        stack.enter_context(stop_on_signal())
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare)
        stack.enter_context(pool)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        waiting = {key: pool.submit(_done, job) for key, job in jobs.items()}
        for key, future in waiting.items():
            try:
                yield key, future.result()
            except BrokenProcessPool:
                raise UsageError(
                    "a process died, perhaps because memory ran out; rerun the same command to resume"
                ) from None


def _prepare() -> None:
    """Uses one thread, and leaves interrupts to the parent."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, _by_value)


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    """Sends a tensor to the parent by value: PyTorch's own way keeps a shared-memory file open for each."""
    import torch

    return torch.from_numpy, (tensor.numpy(),)


def _done(job: Callable[[], Any]) -> Any:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was killed, and nothing waits for the remaining results
        os._exit(1)
    return job()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """SIGTERM ends the wait as SIGINT does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
