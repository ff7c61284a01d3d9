"""Fine-tunes the targets, on the CPU, from every phi that a GPU brought back and from scratch; prints the results.

    python -m studies.regime.finetune DATA OUT     # fine-tunes, two at a time, one thread each
    python -m studies.regime.finetune              # prints the tables, draws accuracy-SIZE.svg

OUT is the folder that `studies.regime.train` wrote; its runs.jsonl and tuning.jsonl are copied beside the rows.
Fine-tunings in rows.jsonl are not done again, so rerunning the same command resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from studies.command import new_app, resumable, run_app
from studies.images.rows import SCRATCH
from studies.regime.setting import REGIME, TARGETS, Regime, build_image_task, parse_size
from studies.regime.tables import RESULTS, print_tables
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.evaluation.finetuning import finetune
from trajshift.learners.initialization import load_initialization
from trajshift.task import Task
from trajshift.utils.files import append_row, read_jsonl, replace_file
from trajshift.utils.processes import Jobs, run_in_processes
from trajshift.utils.progress import Progress

COPIED = ("runs.jsonl", "tuning.jsonl")
OF_RUN = ("size", "method", "seed", "inner_lr", "meta_lr", "tuned")
"""What a row takes over from its run; rates and `tuned` are null for scratch."""
NAMES = (*OF_RUN, "inner_steps", "target", "train_images", "finetune_lr")


@dataclass(frozen=True)
class Start:
    """What is fine-tuned from: a phi, or nothing."""

    size: str
    method: str
    seed: int
    inner_lr: float | None = None
    meta_lr: float | None = None
    tuned: bool | None = None
    inner_steps: int = 0
    phi: Path | None = None


@dataclass(frozen=True)
class Job:
    """One fine-tuning."""

    data: Path
    start: Start
    target: str
    finetune_lr: float
    regime: Regime

    def row(self) -> dict[str, Any]:
        """The fields that identify it in rows.jsonl."""
        named = {name: getattr(self.start, name) for name in (*OF_RUN, "inner_steps")}
        images = self.regime.finetune_images
        return named | {"target": self.target, "train_images": images, "finetune_lr": self.finetune_lr}


@cache
def task(name: str, data: Path, size: str) -> Task:
    """A target, loaded once in each process."""
    return build_image_task(name, data, parse_size(size))


def work(job: Job) -> dict[str, Any]:
    """The job's row with its test metrics, or the error that ended it."""
    torch.set_num_threads(1)
    start = job.start
    phi = None if start.phi is None else load_initialization(start.phi)
    target, settings = task(job.target, job.data, start.size), job.regime.finetune(job.finetune_lr)
    try:
        tuned = finetune(phi, target, settings, model=job.regime.factory(), seed=start.seed)
    except NonFiniteLoss as error:
        return job.row() | {"error": str(error)}  # a result too
    return job.row() | tuned.metrics


def starts(out: Path) -> list[Start]:
    """From scratch once per size and seed, then every phi, seed by seed and round by round.

    Raises:
        UsageError: no run is there, or a phi that runs.jsonl names is not.
    """
    found: list[Start] = []
    for run in read_jsonl(out / "runs.jsonl", {"method": str, "seed": int, "size": str}):
        of_run = {name: run[name] for name in OF_RUN}
        for step, name in run.get("phi", {}).items():
            if not (out / name).is_file():
                raise UsageError(f"{out / 'runs.jsonl'} names {name}, which is not in {out}; unpack it there")
            found.append(Start(**of_run, inner_steps=int(step), phi=out / name))
    if not found:
        raise UsageError(f"{out} contains no finished run; name the folder that studies.regime.train wrote")
    places = dict.fromkeys((start.size, start.seed) for start in found)
    scratch = [Start(size=size, method=SCRATCH, seed=seed) for size, seed in places]
    return sorted([*scratch, *found], key=lambda start: (start.size, start.seed, start.inner_steps))


def jobs(data: Path, out: Path, regime: Regime) -> Iterator[Job]:
    """All fine-tunings, at the first rate before the second."""
    for rate, start, target in product(regime.finetune_lrs, starts(out), TARGETS):
        yield Job(data, start, target, rate, regime)


def fine_tune(data: Path, out: Path, results: Path, processes: int) -> None:
    """Adds the missing rows to rows.jsonl."""
    rows = results / "rows.jsonl"
    known = {tuple(row[name] for name in NAMES) for row in read_jsonl(rows)}
    missing = [job for job in jobs(data, out, REGIME) if tuple(job.row()[name] for name in NAMES) not in known]
    pieces: Jobs = {(number,): partial(work, job) for number, job in enumerate(missing)}
    with Progress("regime", len(missing), unit="fine-tuning") as progress:
        for done, (_, row) in enumerate(run_in_processes(pieces, processes), start=1):
            append_row(rows, row)
            progress.update(done)


# -- the command -----------------------------------------------------------------------------------------------

app = new_app()


@app.command("finetune")
def command(
    data: Annotated[Path | None, typer.Argument(metavar="DATA", help="Folder of the .npz files.")] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder that studies.regime.train wrote.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Fine-tunings at a time, one thread each.")] = 2,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures; default that of the rows.")] = None,
) -> None:
    """Fine-tune the targets from the phis in OUT; without arguments print the tables and draw the figures."""
    if data is None:
        print_tables(results, figures or results)
        return
    if out is None:
        raise UsageError("OUT is missing; name DATA and OUT, or neither for the tables")
    if not data.is_dir():
        raise UsageError(f"there is no folder {data}; name the folder of the .npz files")
    starts(out)
    results.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (out / name).is_file() and out.resolve() != results.resolve():
            replace_file(results / name, (out / name).read_bytes())
    with resumable():
        fine_tune(data, out, results, processes)


if __name__ == "__main__":
    run_app(app, "studies.regime.finetune")
