"""The worker process of `pool`: reads jobs from stdin, one JSON line each, and answers with one line each."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from types import FrameType

from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.runs.directory import RunDirectory
from trajshift.runs.job import Answer, Job
from trajshift.utils.files import disk_errors


def main() -> None:
    """Do jobs until stdin ends, a signal comes or the parent is gone; training then ends with a checkpoint."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the user's code prints goes to the log
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    for line in sys.stdin:
        answer = Answer()
        try:
            if not do(Job.from_line(line)):
                sys.exit(128 + signal.SIGTERM)
        except UsageError as error:
            answer = Answer(str(error), isinstance(error, NonFiniteLoss))
        except Exception as error:
            traceback.print_exc()
            answer = Answer(f"{type(error).__name__}: {error}")
        answers.write(json.dumps(asdict(answer)) + "\n")


def _leave_with(parent: int) -> None:
    """Stops this process if its parent was killed, as nothing waits for its results."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def do(job: Job) -> bool:
    """Train and fine-tune one run; returns False where a signal stopped it."""
    from trajshift.distributed import World, set_threads
    from trajshift.runs.evaluate_runs import evaluate_runs
    from trajshift.runs.train import train

    recipe, run = job.recipe, RunDirectory(job.path)
    if run.is_complete(recipe):
        run.adopt(recipe)
    elif not train(recipe, run.path, resume=True, quiet=True).complete:
        return False
    if job.section is not None:
        set_threads(World(), recipe.execution.threads)  # a run that was complete has not set its own
        with disk_errors(run.path):
            evaluate_runs(
                [run.path],
                targets=job.section,
                train_images=job.train_images,
                checkpoints=job.checkpoints,
                scratch=job.scratch,
            )
    return True


if __name__ == "__main__":
    main()
