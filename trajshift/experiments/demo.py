"""`trajshift demo`: four methods and scratch on the built-in digits, whole pipelines with several seeds each."""

from __future__ import annotations

from pathlib import Path

from trajshift.recipes.recipe import load
from trajshift.report.terminal_summary import print_summary
from trajshift.runs.job import Job
from trajshift.runs.pool import refuse_failures, run_jobs
from trajshift.utils.files import disk_errors
from trajshift.utils.imports import need_report_extra
from trajshift.utils.terminal import console

METHODS: dict[str, tuple[str, ...]] = {
    "trajectory-shifting": (),
    "reptile": ("meta_lr=3",),
    "mtl": (),
    "single-task": ("train_on=[upright]",),
}
"""The methods compared, with what each needs besides the recipe.

Chosen on the recipe's tuning task with seeds that the demo does not use, for each method from a grid whose best is not
at its edge: `trajshift sweep digits method=trajectory-shifting,reptile meta_lr=0.1,0.2,0.4,1,2,3,5 seed=10,11`, and
for the other two `trajshift sweep digits method=mtl inner.lr=0.01,0.02,0.05,0.1 seed=10,11`.
"""
SEEDS = 5
WORKERS = 2
"""Processes, of one thread each: the networks are too small for more."""
QUICK = ("rounds=2", "finetune.steps=10")


def demo_jobs(output: Path, *, quick: bool) -> list[Job]:
    """One job for each method and seed; fine-tuning from scratch goes with the first method."""
    jobs = []
    for method, own in METHODS.items():
        for seed in range(2 if quick else SEEDS):
            place = (f"output.directory={output}", f"output.name={method}-seed{seed}", "output.tensorboard=false")
            fields = [f"method={method}", f"seed={seed}", "threads=1", *own, *(QUICK if quick else ()), *place]
            recipe = load("digits", fields)
            first = method == "trajectory-shifting"
            path = output / f"{method}-seed{seed}"
            jobs.append(Job(path=path, recipe=recipe, section="targets", scratch=first))
    return jobs


def run_demo(output: Path, *, quick: bool = False) -> None:
    """Train, fine-tune, print the table with intervals, write the page; existing runs are not repeated.

    Raises:
        UsageError: a run failed, or `output` contains runs of another recipe.
    """
    need_report_extra()
    from trajshift.evaluation.comparison import summary_tables
    from trajshift.report.write_report import write_report
    from trajshift.runs.collect_rows import collect

    jobs = demo_jobs(output, quick=quick)
    first = jobs[0].recipe
    out = console()
    out.print(
        f"{len(METHODS)} methods x {len(jobs) // len(METHODS)} seeds: {first.total_steps} inner steps on each of "
        f"{len(first.tasks)} tasks made of the digits 0 to 5 (single-task: on one of them), then "
        f"{first.finetune.steps} steps on each of {len(first.targets)} targets made of the digits 6 to 9."
    )
    paths = [job.path for job in jobs]
    with disk_errors(output, option="--output", again="the same command"):
        refuse_failures(run_jobs(jobs, workers=WORKERS, title="demo", log=output / "demo.log"))
        rows, notes = collect(paths)
        for summary in summary_tables(rows):
            print_summary(summary)
        for note in notes:
            out.print(f"note: {note}")
        page = write_report(paths, output / "report.html")
    out.print(f"runs are in {output}, the page is {page}")
