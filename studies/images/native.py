"""Fine-tunes the targets, at their own sizes, from the ends of rounds of runs at K = 1000; tables and native.svg.

What native.jsonl holds is not run again, so a stopped evaluation goes on where it was. Of a run its recipe.yaml and
the shared.safetensors of its checkpoints are read (`trajshift evaluate --checkpoints` wants the heads too, which did
not leave the GPU's machine); the tables also take the losses of native/*/metrics.jsonl.

Command: python studies/images/native.py DATA RUN...     # fine-tunes, two at a time, one thread each
         python studies/images/native.py                 # prints the tables of the README, draws native.svg
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tables import SCRATCH, TARGETS, accuracies, averages, reached, typed, with_holm

from trajshift.errors import NonFiniteLoss
from trajshift.evaluation.comparison import curves
from trajshift.evaluation.finetuning import finetune
from trajshift.evaluation.statistics import compare, interval, show
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.build_trainer import finetune_options
from trajshift.recipes.recipe import load
from trajshift.report.figures import curve_figure, looks, save
from trajshift.runs.starting_points import phi_of
from trajshift.task import Task
from trajshift.training.checkpoint_files import checkpoint_folders
from trajshift.utils.files import append_row, read_jsonl
from trajshift.utils.processes import stop_on_signal
from trajshift.utils.progress import Progress

RESULTS = Path(__file__).parents[2] / "results" / "images"
ROWS = RESULTS / "native.jsonl"
SHIFTING = "trajectory-shifting"
METHODS = (SHIFTING, "mtl", "reptile", "no-shifting", SCRATCH)
ROUND = 1000
IMAGES = 1000
RATES = (0.03, 0.1)
"""Of fine-tuning; at the second the starts break down on one target or another."""
BOTH = (0, 2000, 5000)
"""Inner steps after which both rates are run, 0 for scratch; after others the first alone."""
NAMES = ("method", "seed", "inner_steps", "target", "train_images", "finetune_lr")


@dataclass(frozen=True)
class Job:
    """One fine-tuning: the run, how many inner steps phi has seen (0: none, from scratch), and what it is put to."""

    data: str
    run: Path
    step: int
    target: str
    finetune_lr: float

    def row(self) -> dict[str, Any]:
        """What names it in native.jsonl."""
        recipe = load(self.run)
        start = {"method": recipe.method if self.step else SCRATCH, "seed": recipe.seed, "inner_steps": self.step}
        return start | {"target": self.target, "train_images": IMAGES, "finetune_lr": self.finetune_lr}


@cache
def task(run: Path, data: str, target: str) -> Task:
    """The target as the run's recipe has it."""
    return build_tasks(load(run, [f"data.root={data}"]), [target])[target]


def work(job: Job) -> dict[str, Any]:
    """The job's row with what came of it."""
    torch.set_num_threads(1)
    changed = ["device=cpu", f"finetune.lr={job.finetune_lr}", f"finetune.train_images={IMAGES}"]
    phi = phi_of(checkpoint_folders(job.run / "checkpoints")[job.step]) if job.step else None
    options = finetune_options(load(job.run, changed))
    try:
        return job.row() | finetune(phi, task(job.run, job.data, job.target), **options).metrics
    except NonFiniteLoss as error:
        return job.row() | {"error": str(error)}  # a result too


def jobs(data: str, runs: list[Path]) -> Iterator[Job]:
    """From scratch, and after all rounds that every run of a seed has finished."""
    ends = {run: {step for step in checkpoint_folders(run / "checkpoints") if step % ROUND == 0} for run in runs}
    seeds: dict[int, list[Path]] = defaultdict(list)
    for run in runs:
        seeds[load(run).seed].append(run)
    places = [(runs[0], 0) for runs in seeds.values()]  # from scratch once per seed
    for together in seeds.values():
        common = sorted(set.intersection(*(ends[run] for run in together)))
        places += [(run, step) for step in common for run in together]
    for rate in RATES:
        for (run, step), target in product(places, TARGETS):
            if rate == RATES[0] or step in BOTH:
                yield Job(data, run, step, target, rate)


def fine_tune(data: str, runs: list[Path]) -> None:
    """Runs what native.jsonl does not hold."""
    named = [{name: row[name] for name in NAMES} for row in read_jsonl(ROWS)]
    missing = [job for job in jobs(data, runs) if job.row() not in named]
    with (
        stop_on_signal(),
        get_context("spawn").Pool(2) as pool,
        Progress("native", len(missing), unit="fine-tuning") as progress,
    ):
        for done, row in enumerate(pool.imap_unordered(work, missing), start=1):
            append_row(ROWS, row)
            progress.update(done)


def tables() -> None:
    """Prints all starts after every round, shifting's leads, when it is where Reptile ends and the losses; draws."""
    rows = [row | {"start": (row["inner_steps"], row["method"])} for row in read_jsonl(ROWS) if "accuracy" in row]
    for rate in RATES:
        found = {start: by_seed for start, by_seed in accuracies(rows, IMAGES, rate).items() if by_seed}
        print(f"\n**Rate {rate}**\n\n| inner steps | start | seeds | average | {' | '.join(TARGETS)} |\n|{'---|' * 7}")
        for (step, method), by_seed in sorted(found.items()):
            seeds = [[by_target[target] for target in TARGETS] for by_target in by_seed.values()]
            columns = [[*map(fmean, seeds)], *zip(*seeds, strict=True)]
            cells = [show(interval(column), 2) for column in columns]
            print(f"| {step:,} | {method} | {len(seeds)} | {' | '.join(cells)} |")
        leads(averages(rows, IMAGES, rate))
    sooner(averages(rows, IMAGES, RATES[0]))
    losses()
    draw(rows)


def leads(found: dict[Any, dict[int, float]]) -> None:
    """Prints shifting minus every other method after every round, with p, p after Holm for the round."""
    others = [method for method in METHODS if method not in (SHIFTING, SCRATCH)]
    print(f"\n| inner steps | seeds | {' | '.join(f'minus {other}' for other in others)} |\n|{'---|' * 5}")
    for step in sorted({step for step, _ in found} - {0}):
        tests = compare({method: found.get((step, method), {}) for method in (SHIFTING, *others)}, SHIFTING)
        if not tests[0].count:
            continue
        cells = [show(test.difference, 2, signed=True) + with_holm(test) for test in tests]
        print(f"| {step:,} | {tests[0].count} | {' | '.join(cells)} |")


def sooner(found: dict[Any, dict[int, float]]) -> None:
    """Prints by what factor, seed by seed, shifting is sooner at Reptile's accuracy after each round (0: it is not)."""
    steps = sorted({step for step, _ in found})
    way = {step: found[step, SHIFTING if step else SCRATCH] for step in steps}
    print(f"\n| Reptile after | factor | by seed |\n|{'---|' * 3}")
    for step in steps[1:]:
        factors = []
        for seed, wanted in sorted(found[step, "reptile"].items()):
            of_seed = {at: way[at][seed] for at in steps if seed in way[at]}
            factors.append(step / reached(of_seed, wanted))
        mean = show(interval(factors), 2) if all(factors) else "not reached by all"
        print(f"| {step:,} | {mean} | {', '.join(f'{factor:.2f}' for factor in factors)} |")


def losses() -> None:
    """Prints the training loss over the last 200 steps of each round, mean of the sources, over the seeds."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for run in sorted((RESULTS / "native").iterdir()):
        by_end: dict[int, list[float]] = defaultdict(list)
        for row in read_jsonl(run / "metrics.jsonl"):
            if -row["step"] % ROUND < 200:  # four rows, one each 50 steps
                by_end[ROUND * -(-row["step"] // ROUND)].append(fmean(t["loss"] for t in row["tasks"].values()))
        for step, values in by_end.items():
            if len(values) == 4:
                found[step, load(run).method].append(fmean(values))
    steps = sorted({step for step, _ in found})
    print(f"\n| training loss after | {' | '.join(f'{step:,}' for step in steps)} |\n|{'---|' * (1 + len(steps))}")
    for method in METHODS:
        if method != SCRATCH:
            print(f"| {method} | {' | '.join(show(interval(found[step, method]), 2) for step in steps)} |")


def draw(rows: list[dict[str, Any]]) -> None:
    """Draws native.svg: seeds with all rounds against inner steps, at the first rate, scratch as a level."""
    whole = {row["seed"] for row in rows if row["inner_steps"] == BOTH[-1]}
    first = [row for row in rows if row["seed"] in whole and row["finetune_lr"] == RATES[0]]
    first.sort(key=lambda row: METHODS.index(row["method"]))
    trained = [(row["inner_steps"], typed(row, label=row["method"])) for row in first if row["inner_steps"]]
    untrained = [(0, typed(row, label=SCRATCH)) for row in first if not row["inner_steps"]]
    panels, levels = {}, {}
    for target in (None, *TARGETS):
        curve = partial(curves, metric="accuracy", target=target)
        panels[target or "average"] = curve(trained)
        levels[target or "average"] = {SCRATCH: curve(untrained)[0].y[-1]}
    styles = looks(METHODS)
    save(curve_figure(panels, styles, metric="accuracy", xlabel="inner steps", levels=levels), "native", RESULTS)
    (RESULTS / "native.png").unlink()


if __name__ == "__main__":
    data, *runs = sys.argv[1:] or [""]
    absent = [run for run in runs if not checkpoint_folders(Path(run) / "checkpoints")]
    if absent or (data and not runs):
        wrong = f"{absent[0]} has no checkpoints" if absent else "name the runs too"
        print(f"native.py: {wrong}; DATA RUN..., or nothing for the tables", file=sys.stderr)
        sys.exit(2)
    try:
        fine_tune(data, [Path(run) for run in runs]) if runs else tables()
    except KeyboardInterrupt:
        print("native.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
