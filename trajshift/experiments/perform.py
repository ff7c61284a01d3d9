"""Independent pieces of work, in one process or several."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from trajshift.errors import UsageError
from trajshift.pool import stop_on_signal

Key = tuple[Any, ...]
Jobs = dict[Key, Callable[[], Any]]


def perform(jobs: Jobs, processes: int) -> Iterator[tuple[Key, Any]]:
    """Results in the order of the jobs; one thread for each process, as all pieces are small.

    Raises:
        UsageError: a process died.
        KeyboardInterrupt: SIGINT or SIGTERM; the processes end with the pieces they have in hand.
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
        waiting = {key: pool.submit(_packed, job) for key, job in jobs.items()}
        for key, future in waiting.items():
            try:
                yield key, pickle.loads(future.result())
            except BrokenProcessPool:
                raise UsageError(
                    "a process died, perhaps for want of memory; give the same command again to go on"
                ) from None


def _prepare() -> None:
    """One thread; and an interrupt is the parent's affair."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _packed(job: Callable[[], Any]) -> bytes:
    """Bytes between two processes: tensors sent as such would each hold a file of shared memory open."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was killed, and nobody waits for the rest
        os._exit(1)
    return pickle.dumps(job())
