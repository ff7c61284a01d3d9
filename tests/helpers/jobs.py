"""Jobs of a pool without its processes, each of which takes seconds to import PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.runs import worker
from trajshift.runs.job import Job


def run_jobs_here(jobs: Sequence[Job], **options: Any) -> dict[Path, UsageError]:
    """Stands for `trajshift.runs.pool.run_jobs`: the same work in this process, one job after another."""
    failures = {}
    for job in jobs:
        try:
            assert worker.do(Job.from_line(job.to_line()))
        except UsageError as error:
            failures[job.path] = error
    return failures
