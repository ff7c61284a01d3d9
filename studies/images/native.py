"""Fine-tunes the targets, at their own sizes, from the ends of rounds of runs at K = 1000.

    python -m studies.images.native DATA RUN...     # fine-tunes, two at a time, one thread each
    python -m studies.images.native                 # prints the tables of the README, draws native.svg

Fine-tunings in native.jsonl are not done again, so rerunning the same command resumes an evaluation that was stopped.
Only the recipe.yaml of a run and the shared.safetensors of its checkpoints are read (`trajshift evaluate --checkpoints`
needs the heads too, which were not copied from the GPU's machine). The tables also use the losses of
native/*/metrics.jsonl.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from studies.command import new_app, resumable, run_app
from studies.images.native_tables import print_tables
from studies.images.rows import RATES, RESULTS, SCRATCH, TARGETS
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.evaluation.finetuning import finetune
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.build_trainer import finetune_options
from trajshift.recipes.recipe import load
from trajshift.runs.starting_points import phi_of
from trajshift.task import Task
from trajshift.training.checkpoint_files import checkpoint_folders
from trajshift.utils.files import append_row, read_jsonl
from trajshift.utils.processes import Jobs, run_in_processes
from trajshift.utils.progress import Progress

IMAGES = 1000
BOTH_RATES_AFTER = (0, 2, 5)
"""Rounds after which both fine-tuning rates are run, 0 for scratch; after others only the first."""
NAMES = ("method", "seed", "inner_steps", "target", "train_images", "finetune_lr")


@dataclass(frozen=True)
class Job:
    """One fine-tuning: the run, the inner steps behind phi (0: from scratch), and what is fine-tuned."""

    data: Path
    run: Path
    step: int
    target: str
    finetune_lr: float

    def row(self) -> dict[str, Any]:
        """The fields that identify it in native.jsonl."""
        recipe = load(self.run)
        start = {"method": recipe.method if self.step else SCRATCH, "seed": recipe.seed, "inner_steps": self.step}
        return start | {"target": self.target, "train_images": IMAGES, "finetune_lr": self.finetune_lr}


@cache
def task(run: Path, data: Path, target: str) -> Task:
    """The target as the run's recipe has it."""
    return build_tasks(load(run, [f"data.root={data}"]), [target])[target]


def work(job: Job) -> dict[str, Any]:
    """The job's row with its test metrics, or the error that ended it."""
    torch.set_num_threads(1)
    changed = ["device=cpu", f"finetune.lr={job.finetune_lr}", f"finetune.train_images={IMAGES}"]
    phi = phi_of(checkpoint_folders(job.run / "checkpoints")[job.step]) if job.step else None
    options = finetune_options(load(job.run, changed))
    try:
        return job.row() | finetune(phi, task(job.run, job.data, job.target), **options).metrics
    except NonFiniteLoss as error:
        return job.row() | {"error": str(error)}  # a result too


def jobs(data: Path, runs: Sequence[Path]) -> Iterator[Job]:
    """From scratch, and after all rounds that every run of a seed has finished."""
    horizon = load(runs[0]).horizon
    ends = {run: {step for step in checkpoint_folders(run / "checkpoints") if step % horizon == 0} for run in runs}
    seeds: dict[int, list[Path]] = defaultdict(list)
    for run in runs:
        seeds[load(run).seed].append(run)
    places = [(runs[0], 0) for runs in seeds.values()]  # from scratch once per seed
    for together in seeds.values():
        common = sorted(set.intersection(*(ends[run] for run in together)))
        places += [(run, step) for step in common for run in together]
    for rate in RATES:
        for (run, step), target in product(places, TARGETS):
            if rate == RATES[0] or step // horizon in BOTH_RATES_AFTER:
                yield Job(data, run, step, target, rate)


def fine_tune(data: Path, runs: Sequence[Path], results: Path, processes: int) -> None:
    """Adds the missing rows to native.jsonl."""
    rows = results / "native.jsonl"
    named = [{name: row[name] for name in NAMES} for row in read_jsonl(rows)]
    missing = [job for job in jobs(data, runs) if job.row() not in named]
    pieces: Jobs = {(number,): partial(work, job) for number, job in enumerate(missing)}
    with Progress("native", len(missing), unit="fine-tuning") as progress:
        for done, (_, row) in enumerate(run_in_processes(pieces, processes), start=1):
            append_row(rows, row)
            progress.update(done)


# -- the command -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def native(
    data: Annotated[Path | None, typer.Argument(metavar="DATA", help="Folder of the .npz files.")] = None,
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Runs with checkpoints.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Fine-tunings at a time, one thread each.")] = 2,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figure; default that of the rows.")] = None,
) -> None:
    """Fine-tune from the runs named; without arguments print the tables and draw native.svg."""
    if data is None:
        print_tables(results, figures or results)
        return
    if not runs:
        raise UsageError("no run was named; name DATA and at least one RUN, or neither for the tables")
    for path in runs:
        if not checkpoint_folders(path / "checkpoints"):
            raise UsageError(f"{path} has no checkpoints; name runs that kept theirs (output.keep=null)")
    results.mkdir(parents=True, exist_ok=True)
    with resumable():
        fine_tune(data, runs, results, processes)


if __name__ == "__main__":
    run_app(app, "studies.images.native")
