"""Many runs on one machine: a few worker processes, each with its share of the cores.

A job is one run: meta-train its directory (or resume there), then fine-tune the tasks of one section. Jobs leave
everything in their run directories, so a pool that was stopped resumes where it was.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from trajshift.errors import UsageError
from trajshift.recipes.sections import DataRecipe, TaskRecipe
from trajshift.runs.collect_rows import FILE
from trajshift.runs.directory import RunDirectory
from trajshift.runs.job import Answer, Job
from trajshift.runs.resume import with_threads
from trajshift.utils.processes import cores, stop_on_signal
from trajshift.utils.progress import Progress

LOOK_EVERY = 1.0
"""Seconds between checks of the runs' progress."""


def run_jobs(jobs: Sequence[Job], *, workers: int, title: str, log: Path) -> dict[Path, UsageError]:
    """Do all jobs in `workers` processes; returns for each run that failed why: `NonFiniteLoss` where it diverged.

    Each process gets cores / workers threads, unless the recipe (or the run that is continued) says otherwise.
    What the workers print goes to the file `log`. SIGINT and SIGTERM stop the workers, which save checkpoints.

    Raises:
        UsageError: a run directory contains a run of another recipe, or something that the runs need is missing: a
            device, weights to start from, data, or the test images of what is fine-tuned.
        KeyboardInterrupt: stopped by a signal; the same jobs can be given again.
    """
    # before any work, fails if a directory contains another run
    _refuse_what_is_missing([job for job in jobs if not RunDirectory(job.path).is_complete(job.recipe)])
    workers = max(1, min(workers, len(jobs)))
    threads = max(1, cores() // workers)
    ready: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        ready.put(_with_threads(job, threads))
    results: queue.SimpleQueue[tuple[Path, UsageError | None]] = queue.SimpleQueue()
    failures: dict[Path, UsageError] = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        staff = [_Worker(ready, results, file, threads) for _ in range(workers)]
        with stop_on_signal(), Progress(title, _total(jobs), start=_done(jobs)) as progress:
            try:
                for worker in staff:
                    worker.start()
                _wait(jobs, results, failures, progress)
            finally:
                for worker in staff:
                    worker.stop()
    return failures


def _refuse_what_is_missing(jobs: Sequence[Job]) -> None:
    """Looks for each thing once: devices, weights to start from, caches, and the data of what is fine-tuned last."""
    if not jobs:
        return
    from trajshift.learners.pretrained import load_start
    from trajshift.recipes.build_tasks import build_task
    from trajshift.recipes.build_trainer import refuse_absent_device
    from trajshift.task import untested

    for device in dict.fromkeys(str(job.recipe.execution.device) for job in jobs):
        refuse_absent_device(device)
    for start in dict.fromkeys(job.recipe.initialization for job in jobs):
        if start is not None:
            load_start(start)
    wanted: dict[str, tuple[str, TaskRecipe, DataRecipe, bool]] = {}
    for job in jobs:
        data, last = job.recipe.data, job.tuned_tasks()
        for name, task in (job.recipe.source_tasks() | last).items():
            if task.source.startswith("cache:") or name in last:
                wanted.setdefault(f"{task} {data}", (name, task, data, name in last))
    errors = []
    for name, task, data, tested in wanted.values():
        try:
            if build_task(name, task, data).test is None and tested:
                raise untested(name)
        except UsageError as error:
            errors.append((task.source, str(error)))
    if errors:
        others = ", ".join(source for source, _ in errors[1:])
        raise UsageError(errors[0][1] + (f"; likewise {others}" if others else ""))


def _with_threads(job: Job, threads: int) -> Job:
    """A run that is continued keeps the threads it was started with."""
    run = RunDirectory(job.path)
    chosen = job.recipe.execution.threads or (run.recipe().execution.threads if run.exists else None) or threads
    return replace(job, recipe=with_threads(job.recipe, chosen))


def _total(jobs: Sequence[Job]) -> int:
    return sum(job.total_steps for job in jobs)


def _done(jobs: Sequence[Job], finished: Collection[Path] = ()) -> int:
    """Steps of training, and of the fine-tunings that left a row."""
    done = 0
    for job in jobs:
        if job.path in finished:
            done += job.total_steps
            continue
        rows = job.path / FILE
        tuned = rows.read_bytes().count(b"\n") * job.recipe.finetune.steps if rows.exists() else 0
        done += min(RunDirectory(job.path).last_step(), job.recipe.total_steps) + min(tuned, job.tuning_steps)
    return done


def _wait(
    jobs: Sequence[Job],
    results: queue.SimpleQueue[tuple[Path, UsageError | None]],
    failures: dict[Path, UsageError],
    progress: Progress,
) -> None:
    finished: set[Path] = set()
    while len(finished) < len(jobs):
        try:
            path, failure = results.get(timeout=LOOK_EVERY)
        except queue.Empty:
            pass
        else:
            finished.add(path)
            if failure is not None:
                failures[path] = failure
                progress.note(f"{path.name} failed: {failure}")
        note = f"{len(finished)} of {len(jobs)} runs trained and fine-tuned"
        progress.update(_done(jobs, finished - failures.keys()), note=note)


class _Worker(threading.Thread):
    """Feeds one worker process; starts another where one died."""

    def __init__(
        self,
        ready: queue.SimpleQueue[Job],
        results: queue.SimpleQueue[tuple[Path, UsageError | None]],
        log: IO[str],
        threads: int,
    ) -> None:
        super().__init__(daemon=True)
        self._ready, self._results, self._log, self._threads = ready, results, log, threads
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False

    def run(self) -> None:
        """Take jobs until there are none."""
        while not self._stopping:
            try:
                job = self._ready.get_nowait()
            except queue.Empty:
                break
            try:
                failure = self._do(job)
            # The process could not be started, or its answer is malformed: nothing may wait forever.
            except Exception as error:
                failure = UsageError(f"{type(error).__name__}: {error}")
            if not self._stopping:
                self._results.put((job.path, failure))

    def _do(self, job: Job) -> UsageError | None:
        """Do one job; returns why it failed."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(job.to_line())
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self._process = None
            status = process.wait()
            process.stdout.close()
            with suppress(OSError):
                process.stdin.close()
            if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                return UsageError("a signal stopped its process; rerun the same command to resume")
            return UsageError(f"its process ended with status {status}; see {self._log.name}")
        return Answer(**json.loads(answer)).error()

    def _start(self) -> subprocess.Popen[str]:
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trajshift.runs.worker", str(self._threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads), "PYTHONPATH": path},
        )
        return self._process

    def stop(self) -> None:
        """End the process: at once where it is idle, after a checkpoint where it trains."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        if self.is_alive():
            process.terminate()
        _wait_patiently(process)
        if process.stdout is not None:
            self.join()
            process.stdout.close()


def _wait_patiently(process: subprocess.Popen[str]) -> None:
    """Wait for a process that may be writing a checkpoint, whatever signals come meanwhile."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            continue
    if process.poll() is None:
        process.kill()
        process.wait()


def refuse_failures(failures: dict[Path, UsageError]) -> None:
    """Raises if any run failed.

    Raises:
        UsageError: names the first.
    """
    for path, failure in failures.items():
        raise UsageError(f"{path} failed: {failure}")
