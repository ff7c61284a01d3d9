"""`trajshift experiment landscape`: measures, draws figures 4 and 5, and writes findings, page and numbers.

OUT/ contains 4a, 4b, 4c, 4d, 5ab, 5cd and comparison as .svg and .png, findings.md, index.html, results.json and
arrays.npz (what the figures were drawn from).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trajshift.experiments.landscape import measure
from trajshift.experiments.landscape.measure import METHODS, End, Settings
from trajshift.experiments.landscape.results import Results
from trajshift.utils.environment import environment
from trajshift.utils.files import disk_errors, replace_file, write_json
from trajshift.utils.imports import need_report_extra
from trajshift.utils.processes import Jobs, Key, run_in_processes
from trajshift.utils.progress import Progress, duration

UNITS = ("meta-updates", "inner steps")
PUBLISHED = ("trajectory-shifting", "accurate", "no-shifting", "random-shifting", "reptile")
DRAWN = ("trajectory-shifting", "accurate", "reptile")
_SETS_A_JOB = 10


def run_experiment(out: Path, *, study: bool = False, settings: Settings | None = None) -> None:
    """Measures and writes everything to `out`; with `study` the comparison over all starts follows."""
    from trajshift.experiments.landscape.findings import findings
    from trajshift.experiments.landscape.presentation import page

    need_report_extra()
    began = time.monotonic()
    settings = settings or Settings()
    with disk_errors(out, option="--out", again="the same command"):
        out.mkdir(parents=True, exist_ok=True)
        results = measured(settings)
        found = findings(results)
        replace_file(out / "findings.md", found.markdown())
        replace_file(out / "index.html", page(results, found, out))
        _write_numbers(out, results, found.numbers)
        print(f"{out / 'index.html'} and findings.md are written, {duration(time.monotonic() - began)}")
        if study:
            from trajshift.experiments.landscape.study import run_study

            run_study(out)


# -- measuring -------------------------------------------------------------------------------------------------------


def measured(settings: Settings) -> Results:
    """Runs all jobs and puts their parts together."""
    jobs = _jobs(settings)
    done: dict[Key, Any] = {}
    with Progress("landscape", len(jobs)) as progress:
        for key, value in run_in_processes(jobs, settings.processes):
            done[key] = value
            progress.update(len(done), note=" ".join(map(str, key)))

    def parts(*key: Any) -> list[Any]:
        """The results of a job that was split, in order."""
        return [done[one] for one in jobs if one[: len(key)] == key]

    return Results(
        settings=settings,
        ends={unit: {method: _joined(parts("compare", unit, method)) for method in METHODS} for unit in UNITS},
        yardsticks=torch.cat(parts("yardsticks", "random"), dim=1),
        published={method: done["published", method] for method in PUBLISHED},
        published_yardstick=done["yardsticks", "published"],
        bias=torch.cat(parts("bias", "random")),
        bias_published=done["bias", "published"][0],
        optima={k: done["optima", k, None] for k in _lengths(settings)},
        clusters={
            k: [done["optima", k, seed].cluster_count for seed in range(settings.sets)] for k in _lengths(settings)
        },
        runs={method: done["trajectories", method] for method in DRAWN},
        contour=done["contour",],
    )


def _lengths(settings: Settings) -> tuple[int, int]:
    return settings.short, settings.horizon


def _jobs(settings: Settings) -> Jobs:
    """Every piece by its key, the long ones first so that processes end together."""
    jobs: Jobs = {}
    for unit in UNITS:
        for method in reversed(METHODS):
            for seeds in _blocks(settings.sets):
                jobs["compare", unit, method, seeds[0]] = partial(measure.compare, method, seeds, unit, settings)
    for method in PUBLISHED:
        jobs["published", method] = partial(measure.published, method, settings)
    for method in DRAWN:
        jobs["trajectories", method] = partial(measure.trajectories, method, settings)
    for k in _lengths(settings):
        for seed in (None, *range(settings.sets)):
            jobs["optima", k, seed] = partial(measure.resting_points, k, seed, settings)
    for seeds in _blocks(settings.bias_sets):
        jobs["bias", "random", seeds[0]] = partial(measure.horizon_bias, seeds, settings)
    jobs["bias", "published"] = partial(measure.horizon_bias, [None], settings)
    for seeds in _blocks(settings.sets):
        jobs["yardsticks", "random", seeds[0]] = partial(measure.yardsticks, seeds, settings)
    jobs["yardsticks", "published"] = partial(measure.yardsticks, [None], settings)
    jobs["contour",] = partial(measure.contour, settings)
    return jobs


def _blocks(count: int) -> list[list[int]]:
    return [list(range(first, min(first + _SETS_A_JOB, count))) for first in range(0, count, _SETS_A_JOB)]


def _joined(ends: Sequence[End]) -> End:
    """The same method on more sets."""
    first = ends[0]
    return End(
        phi=torch.cat([end.phi for end in ends]),
        quality=torch.cat([end.quality for end in ends]),
        left=torch.cat([end.left for end in ends]),
        overflowed=torch.cat([end.overflowed for end in ends]),
        marked=torch.cat([end.marked for end in ends], dim=1) if first.marked.dim() > 1 else first.marked,
        updates=first.updates,
        inner_steps=first.inner_steps,
    )


# -- numbers ---------------------------------------------------------------------------------------------------------


def _write_numbers(out: Path, results: Results, numbers: dict[str, Any]) -> None:
    about = {"settings": asdict(results.settings), "environment": environment()}
    write_json(out / "results.json", about | numbers)
    arrays: dict[str, Any] = {
        "contour": results.contour,
        "bias": results.bias,
        "bias_published": results.bias_published,
    }
    arrays |= {f"optima_{k}": found.points for k, found in results.optima.items()}
    for method, made in results.runs.items():
        arrays |= {f"phi_{method}": made.phi, f"inner_steps_{method}": made.inner_steps}
    for unit, ends in results.ends.items():
        arrays |= {f"quality_{unit}_{method}".replace(" ", "-"): end.quality for method, end in ends.items()}
    np.savez_compressed(out / "arrays.npz", **arrays)
