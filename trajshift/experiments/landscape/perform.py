"""Independent pieces of work, in one process or several."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

Key = tuple[Any, ...]
Jobs = dict[Key, Callable[[], Any]]


def perform(jobs: Jobs, processes: int) -> Iterator[tuple[Key, Any]]:
    """Results in the order of the jobs; one thread for each process, as all pieces are small."""
    if processes == 1:
        for key, job in jobs.items():
            yield key, job()
        return
    with ExitStack() as stack:
        pool = stack.enter_context(
            ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = {key: pool.submit(_packed, job) for key, job in jobs.items()}
        for key, future in waiting.items():
            yield key, pickle.loads(future.result())


def _packed(job: Callable[[], Any]) -> bytes:
    """Bytes between two processes: tensors sent as such would each hold a file of shared memory open."""
    return pickle.dumps(job())
