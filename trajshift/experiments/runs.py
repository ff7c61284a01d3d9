"""Does the published experiments: trains and fine-tunes what is missing, prints and writes the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from trajshift.commands import need_report_extra
from trajshift.errors import UsageError
from trajshift.experiments.published import EXPERIMENTS, SCALES
from trajshift.pool import Job, cores, run_jobs
from trajshift.recipe import load
from trajshift.tables import console, print_summary

Choices = Mapping[str, tuple[str, ...]]
"""Method -> the fields a sweep chose."""


def sweep_choices(file: Path) -> Choices:
    """What a sweep over `method` and other fields chose, from its sweep.json.

    Raises:
        UsageError: no such file, or one without a choice for each method.
    """
    try:
        found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))["choice"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no readable sweep.json ({type(error).__name__}: {error})") from None
    if not found or "" in found:
        raise UsageError(f"{file} has no choice for each method; sweep with method=A,B,...")
    skip = ("method", "seed")
    return {
        method: tuple(f"{field}={value}" for field, value in point.items() if field not in skip)
        for method, point in found.items()
    }


def experiment_jobs(
    name: str,
    *,
    scale: str = "full",
    seeds: int = 5,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    tuned: Choices | None = None,
) -> list[Job]:
    """One job for each arm and seed; the start without meta-training is fine-tuned with the first arm.

    `tuned` fields come in the place of the published ones, except where an arm has another horizon than the one that
    was tuned.

    Raises:
        UsageError: an unknown scale, no seed, or an override that does not fit.
    """
    if scale not in SCALES:
        raise UsageError(f"scale is {scale!r}; use {', '.join(SCALES)}")
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it must be at least 1")
    published = EXPERIMENTS[name]
    study = published.study
    folder = out or Path("runs") / f"{study.recipe.partition('-')[0]}{'' if scale == 'full' else f'-{scale}'}"
    arms = published.by_scale[scale] if published.by_scale else published.arms
    jobs = []
    base = load(study.recipe, [*study.scales[scale], *overrides])
    for arm, own in arms.items():
        recipe = load(study.recipe, [*study.scales[scale], *own, *overrides])
        chosen = (tuned or {}).get(recipe.method, ()) if recipe.horizon == base.horizon else ()
        for seed in range(seeds):
            run = f"{arm}-seed{seed}"
            place = (f"seed={seed}", f"output.directory={folder}", f"output.name={run}")
            jobs.append(
                Job(
                    path=folder / run,
                    recipe=load(study.recipe, [*study.scales[scale], *own, *chosen, *overrides, *place]),
                    section="targets",
                    scratch=arm == next(iter(arms)),
                    checkpoints=published.checkpoints,
                    train_images=study.images[scale] if published.few_data else None,
                )
            )
    return jobs


def run_published(
    name: str,
    *,
    scale: str = "full",
    seeds: int = 5,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    workers: int | None = None,
    tuned: Path | None = None,
) -> Path:
    """Train and fine-tune what is not done yet, print the comparison and write the page; returns its path.

    A run that failed is named and left out.

    Raises:
        UsageError: what does not fit, or no run that succeeded.
    """
    need_report_extra()
    from trajshift.evaluate import collect, summary_tables
    from trajshift.report import write_report

    choices = None if tuned is None else sweep_choices(tuned)
    jobs = experiment_jobs(name, scale=scale, seeds=seeds, overrides=overrides, out=out, tuned=choices)
    folder, first = jobs[0].path.parent, jobs[0].recipe
    say = console()
    say.print(
        f"{EXPERIMENTS[name].summary}\n{len(jobs)} runs of {first.total_steps:,} inner steps per task "
        f"({len(jobs) // seeds} methods x {seeds} seeds), then {len(first.targets)} targets each; runs are in {folder}"
    )
    workers = workers or (cores() if first.device == "cpu" else 1)
    failures = run_jobs(jobs, workers=workers, title=name, log=folder / f"{name}.log")
    paths = [job.path for job in jobs if job.path not in failures]
    for path, failure in failures.items():
        say.print(f"failed: {path.name}: {failure}")
    if not paths:
        raise UsageError(f"all runs of {name} failed; the first: {next(iter(failures.values()))}")
    rows, notes = collect(paths)
    for summary in summary_tables(rows):
        print_summary(summary)
    for note in notes:
        say.print(f"note: {note}")
    page = write_report(paths, folder / f"{name}.html")
    say.print(f"the page is {page}")
    return page
