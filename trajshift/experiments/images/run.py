"""Runs the published experiments: trains and fine-tunes what is missing, prints and writes the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trajshift.errors import UsageError
from trajshift.experiments.images.catalogue import EXPERIMENTS, SCALES, Arms
from trajshift.experiments.images.tuned_rates import Tuned, read_tuned
from trajshift.recipes.recipe import Recipe, load, respelled, split_override
from trajshift.report.terminal_summary import print_summary
from trajshift.runs.collect_rows import collect
from trajshift.runs.job import Job
from trajshift.runs.pool import run_jobs
from trajshift.settings import at_least
from trajshift.utils.files import disk_errors
from trajshift.utils.imports import need_report_extra
from trajshift.utils.processes import cores
from trajshift.utils.terminal import console

_DECIDED = {"seed": "--seeds N", "output.directory": "--out DIR", "output.name": "--out DIR"}
"""Fields that an option sets."""


def experiment_jobs(
    name: str,
    *,
    scale: str = "full",
    seeds: int = 5,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    tuned: Tuned | None = None,
) -> list[Job]:
    """One job for each arm and seed; the start without meta-training is fine-tuned with the first arm.

    `tuned` rates replace the published ones, except where an arm has another horizon than the one that was tuned.

    Raises:
        UsageError: an unknown scale, no seed, or an override that does not fit or would change what the runs compare.
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it must be at least 1")
    published = EXPERIMENTS[name]
    study = published.study
    overrides = [respelled(word) for word in overrides]
    folder = out or Path("runs") / f"{study.recipe.partition('-')[0]}{'' if scale == 'full' else f'-{scale}'}"
    base = _base(name, scale, overrides)
    arms = published.by_scale[scale] if published.by_scale else published.arms
    _refuse_decided(name, arms, overrides)
    jobs = []
    for arm, own in arms.items():
        recipe = load(study.recipe, [*study.scales[scale], *own, *overrides])
        chosen = _chosen(tuned, recipe, base)
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


def _chosen(tuned: Tuned | None, recipe: Recipe, base: Recipe) -> tuple[str, ...]:
    """The tuned rates for a run; none at another horizon than the one that was tuned."""
    return tuned.rates.get(recipe.method, ()) if tuned and recipe.horizon == base.horizon else ()


def _untuned(tuned: Tuned, jobs: Sequence[Job], base: Recipe) -> list[str]:
    """A note on the runs that keep the recipe's rates while others are tuned.

    Raises:
        UsageError: the sweeps chose for none of the runs.
    """
    if not tuned.rates:
        return []
    left = [job for job in jobs if not _chosen(tuned, job.recipe, base)]
    if len(left) == len(jobs):
        methods = ", ".join(dict.fromkeys(job.recipe.method for job in jobs))
        raise UsageError(f"--tuned has rates for {', '.join(tuned.rates)}, and this experiment runs {methods}")
    names = ", ".join(dict.fromkeys(job.path.name.rpartition("-seed")[0] for job in left))
    return [f"not tuned, with the recipe's own rates: {names}"] if names else []


def _unlike_registered(jobs: Sequence[Job], scale: str) -> list[str]:
    """Notes on caches with other counts than the registered ones; scale `check` accepts any.

    Raises:
        UsageError: `full`, and a cache has another size in pixels.
    """
    from trajshift.data.cache_reader import figures_that_differ, read_manifest
    from trajshift.data.registry import find

    if scale == "check":
        return []
    notes: dict[str, list[str]] = {}
    recipes = [job.recipe for job in jobs]
    tasks = [(task, each.data) for each in recipes for task in (each.source_tasks() | each.targets).values()]
    for task, data in tasks:
        if not task.source.startswith("cache:"):
            continue
        name = task.source.removeprefix("cache:")
        entry = find(find(name).whole or name)
        folder = Path(data.root).expanduser() / entry.name
        if entry.name in notes or not folder.is_dir():
            continue
        manifest = read_manifest(folder, entry)
        pixels = manifest["images"]["train"][2]
        if scale == "full" and data.size is None and task.size is None and pixels != entry.size:
            raise UsageError(
                f"{folder} has images of {pixels} pixels, but --scale full needs the registered {entry.size}; "
                "name the folder of such caches with data.root=DIR, or use --scale small"
            )
        notes[entry.name] = [f"{entry.name}: {text}" for text in figures_that_differ(manifest, entry)]
    return [note for found in notes.values() for note in found]


def _base(name: str, scale: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that the runs of an experiment have in common."""
    if scale not in SCALES:
        raise UsageError(f"scale is {scale!r}; use {', '.join(SCALES)}")
    study = EXPERIMENTS[name].study
    return load(study.recipe, [*study.scales[scale], *map(respelled, overrides)])


def _refuse_decided(name: str, arms: Arms, overrides: Sequence[str]) -> None:
    """Rejects an override of a field that an option or the experiment itself sets."""
    by_arm = {split_override(word)[0][0] for own in arms.values() for word in own}
    for word in overrides:
        path, _ = split_override(word)
        field = ".".join(path)
        if field in _DECIDED:
            raise UsageError(f"{word} would be the same in all runs of {name}; use {_DECIDED[field]} instead")
        if path[0] in by_arm:
            remedy = "pass rates with --tuned" if field == "meta_lr" else "make such a run with trajshift train"
            raise UsageError(f"{word} cannot be set for {name}, whose runs set {path[0]} themselves; {remedy}")


def run_published(
    name: str,
    *,
    scale: str = "full",
    seeds: int = 5,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    workers: int | None = None,
    tuned: Sequence[Path] = (),
) -> Path:
    """Train and fine-tune what is not done yet, print the comparison and write the page; returns its path.

    Raises:
        UsageError: something does not fit, or runs failed; the page is written from the others.
    """
    need_report_extra()
    at_least("--jobs", workers, 1, "run")
    base = _base(name, scale, overrides)
    rates = read_tuned(tuned, EXPERIMENTS[name].study.recipe, base.horizon)
    jobs = experiment_jobs(name, scale=scale, seeds=seeds, overrides=overrides, out=out, tuned=rates)
    notes = [*_untuned(rates, jobs, base), *rates.notes, *_unlike_registered(jobs, scale)]
    folder, first = jobs[0].path.parent, jobs[0].recipe
    say = console()
    say.print(
        f"{EXPERIMENTS[name].summary}\n{len(jobs)} runs of {first.total_steps:,} inner steps per task "
        f"({len(jobs) // seeds} methods x {seeds} seeds), then {len(first.targets)} targets each; runs are in {folder}"
    )
    for note in notes:
        say.print(f"note: {note}")
    workers = workers or (cores() if first.execution.device == "cpu" else 1)
    with disk_errors(folder, option="--out", again="the same command"):
        failures = run_jobs(jobs, workers=workers, title=name, log=folder / f"{name}.log")
        page = _write(name, jobs, failures, notes)
    say.print(f"the page is {page}")
    if failures:
        count = f"{len(failures)} of {len(jobs)} runs"
        why = next(iter(failures.values()))
        raise UsageError(
            f"{count} failed and are left out of the page; rerun the same command to try again; the first: {why}"
        )
    return page


def _write(name: str, jobs: Sequence[Job], failures: Mapping[Path, UsageError], notes: Sequence[str]) -> Path:
    """Prints the comparison and writes the page of the runs that did not fail."""
    from trajshift.evaluation.comparison import summary_tables
    from trajshift.report.write_report import write_report

    paths = [job.path for job in jobs if job.path not in failures]
    if not paths:
        raise UsageError(f"all runs of {name} failed; the first: {next(iter(failures.values()))}")
    failed = [f"failed and left out: {path.name}: {failure}" for path, failure in failures.items()]
    sizes = jobs[0].train_images or (jobs[0].recipe.finetune.train_images,)
    rows, left_out = collect(paths, train_images=sizes, as_asked=True)
    for summary in summary_tables(rows):
        print_summary(summary)
    for note in (*failed, *notes, *left_out):
        console().print(f"note: {note}")
    page = jobs[0].path.parent / f"{name}.html"
    return write_report(paths, page, train_images=sizes, as_asked=True, notes=(*failed, *notes))
