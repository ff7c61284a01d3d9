"""`--study`: all methods from every point of the grid, on 20 random sets of tasks, meta_lr tuned for each method.

Three budgets: K * M meta-updates, and K * M and 100 K M inner steps (300, 300 and 30,000). study.jsonl gets one row for
each tuning and each final run, in a fixed order and without a clock, so an interrupted study resumes where it was and
ends with the same file. Each method is tuned for each budget on sets of tasks that are not compared.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from trajshift.errors import UsageError
from trajshift.experiments.landscape.himmelblau import grid
from trajshift.experiments.landscape.measure import METHODS, Limit, finish, random_sets, yardstick
from trajshift.experiments.landscape.study_settings import Row, StudySettings, key_of, limit_of
from trajshift.experiments.saved_rows import saved_rows
from trajshift.utils.files import append_row
from trajshift.utils.processes import Jobs, Key, run_in_processes
from trajshift.utils.progress import Progress, duration

FILE = "study.jsonl"
_WIDEST = 12
"""The most thirds of a decade between meta_lr and 1."""


def run_study(out: Path, *, study: StudySettings | None = None) -> None:
    """Runs what study.jsonl lacks, then writes tables and figures from it."""
    from trajshift.experiments.landscape.study_report import write_report

    began = time.monotonic()
    study = study or StudySettings()
    out.mkdir(parents=True, exist_ok=True)
    print("study: about 20 minutes of one core's time, shared by the processes; to resume it, rerun the same command")
    pairs = {(m, limit_of(m, limit, study.settings)): None for limit in study.limits() for m in METHODS}
    total = 1 + len(pairs) * (1 + study.settings.sets)
    with Progress("study", total) as progress:
        saved = saved_rows(out / FILE)
        if saved and ("settings",) not in saved:
            raise UsageError(
                f"{out / FILE} has no readable row of settings; delete it, or name another folder with --out"
            )
        first: Jobs = {("settings",): partial(_header, study)}
        if _complete(out / FILE, saved, first, 1, progress)["settings",] != _header(study):
            raise UsageError(
                f"{out / FILE} is from a study with other settings; delete it, or name another folder with --out"
            )
        tunings: Jobs = {key_of("tuning", m, limit): partial(tune, m, limit, study) for m, limit in pairs}
        tuned = _complete(out / FILE, saved, tunings, study.settings.processes, progress)
        finals: Jobs = {}
        for m, limit in pairs:
            meta_lr = tuned[key_of("tuning", m, limit)]["meta_lr"]
            for seed in range(study.settings.sets):
                finals[key_of("final", m, limit, seed)] = partial(final, m, limit, seed, meta_lr, study)
        rows = tuned | _complete(out / FILE, saved, finals, study.settings.processes, progress)
    write_report(out, rows, study)
    print(f"the study is in {out / 'study.md'}, {duration(time.monotonic() - began)}")


def _complete(file: Path, saved: dict[Key, Row], jobs: Jobs, processes: int, progress: Progress) -> dict[Key, Row]:
    """The rows of these jobs, saved ones where there are; the others are added to the file."""
    rows = {key: saved[key] for key in jobs if key in saved}
    progress.update(progress.step + len(rows))
    for key, row in run_in_processes({key: job for key, job in jobs.items() if key not in saved}, processes):
        append_row(file, {"key": list(key)} | row)
        rows[key] = row
        progress.update(progress.step + 1, note=" ".join(map(str, key)))
    return rows


def _header(study: StudySettings) -> Row:
    """The settings that rows depend on, as JSON values."""
    row: Row = {"key": ["settings"], "settings": json.loads(json.dumps(asdict(study)))}
    del row["settings"]["settings"]["processes"]
    return row


def tune(method: str, limit: Limit, study: StudySettings) -> Row:
    """The best meta_lr of three a decade, by one rule: extended towards the better side until the best is inside.

    The score is the mean over tuning sets and starts of the final quality, where no start counts as worse than the
    worst point of the domain and one that overflows counts as that.
    """
    landscape = random_sets(study.tuning_seeds)
    starts = grid(study.tuning_side)
    settings = study.settings
    worst = yardstick(landscape, settings)[1][:, None]
    centre = round(3.0 * math.log10(settings.meta_lr))
    scores: dict[int, float] = {}
    wanted = [centre - 1, centre, centre + 1]
    while wanted:
        third = wanted.pop()
        tried = replace(settings, meta_lr=rate(third))
        quality = finish(method, landscape, starts, limit, tried).quality
        scores[third] = float(torch.minimum(quality.nan_to_num(nan=torch.inf), worst).mean())
        best = min(scores, key=lambda one: scores[one])
        if not wanted:
            wanted = [x for x in (best - 1, best + 1) if x not in scores and abs(x) <= _WIDEST]
    return {"meta_lr": rate(best), "scores": {f"{rate(x):g}": float(f"{scores[x]:.6g}") for x in sorted(scores)}}


def rate(third: int) -> float:
    """meta_lr by thirds of a decade, two digits: 0.1, 0.22, 0.46, 1, ..."""
    return float(f"{10.0 ** (third / 3.0):.2g}")


def final(method: str, limit: Limit, seed: int, meta_lr: float, study: StudySettings) -> Row:
    """One method on one set from the whole grid; quality by start, None where it overflowed."""
    settings = replace(study.settings, meta_lr=meta_lr)
    end = finish(method, random_sets([seed]), grid(settings.side), limit, settings)
    return {
        "meta_lr": meta_lr,
        "updates": end.updates,
        "inner_steps": end.inner_steps,
        "left": int(end.left.sum()),
        "overflowed": int(end.overflowed.sum()),
        "quality": [float(f"{q:.4g}") if math.isfinite(q) else None for q in end.quality[0].tolist()],
    }
