"""Tasks side by side: each core runs whole learners, instead of all cores one operation of one learner.

Learners share nothing within an inner step, so no thread has to wait for another, as it must when a convolution is
split over two threads. Every learner is computed by one thread whatever their number: the bits are those
of the loop with one thread.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from trajshift.learners.learner import Learner
from trajshift.rng import seed_generators
from trajshift.task import Batch
from trajshift.training.engines.loop import Engine, without_draws
from trajshift.training.meta_step import MetaStep, Moment

_TRIAL = (2, 8)
"""The steps on which both ways are tried in turn; before them memory and caches warm up."""


class Parallel(Engine):
    """Runs the learners of a step in `threads` threads, if that is faster than one after another (same bits).

    Python code runs in one thread at a time, so for small models it is not faster; the first steps try both ways.
    """

    name = "parallel"

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.side_by_side: bool | None = None
        """The way chosen; None while both are tried."""
        self._executor: ThreadPoolExecutor | None = None
        self._tried: list[tuple[bool, float]] = []
        self._last: dict[str, float] = {}

    def step(self, run: MetaStep) -> tuple[Tensor, bool]:
        """As the loop, with one thread for each operation; otherwise the bits would depend on the number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().step(run)
        finally:
            torch.set_num_threads(before)

    def inner_steps(self, run: MetaStep, moment: Moment) -> Tensor:
        """Side by side, or as the loop does; the first steps try both ways."""
        if self.side_by_side is not None:
            return self._side_by_side(run, moment) if self.side_by_side else super().inner_steps(run, moment)
        way = len(self._tried) % 2 == 1
        began = time.perf_counter()
        losses = self._side_by_side(run, moment) if way else super().inner_steps(run, moment)
        self._tried.append((way, time.perf_counter() - began))
        if len(self._tried) == _TRIAL[1]:
            spent = {way: sum(t for w, t in self._tried[_TRIAL[0] :] if w is way) for way in (False, True)}
            self.side_by_side = spent[True] < spent[False]
        return losses

    def _side_by_side(self, run: MetaStep, moment: Moment) -> Tensor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.threads, "learner", torch.set_num_threads, (1,))
        # What is read example by example comes from loader processes, or draws from the global generators.
        ready = {
            learner.row: learner.batches.train(moment.index, seeded=False)
            for learner in run.learners
            if learner.batches.raw.streams("train")
        }
        seed_generators(0, run.device)
        slowest_first = sorted(run.learners, key=lambda learner: -self._last.get(learner.task.name, 0.0))
        with without_draws(run):
            futures = {
                learner.row: self._executor.submit(self._timed, run, learner, moment, ready.get(learner.row))
                for learner in slowest_first
            }
            wait(futures.values())
            return torch.stack([futures[row].result() for row in range(len(futures))])

    def _timed(self, run: MetaStep, learner: Learner, moment: Moment, batch: Batch | None) -> Tensor:
        began = time.perf_counter()
        loss = run.inner_update(learner, moment, batch, seeded=False)
        self._last[learner.task.name] = time.perf_counter() - began
        return loss
