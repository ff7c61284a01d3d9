"""The rows kept in results/images, and the accuracies, averages and curves they amount to.

A row is one fine-tuning as a JSON object: `method`, `seed`, `target`, `train_images`, `inner_steps`, `accuracy` (a
fraction) and more. Here it also has a `start`, the name it is compared under: a method of runs/, a candidate of
candidates.jsonl or a study of rows.jsonl, such as trajectory-shifting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import Curve, Line, Summary
from trajshift.evaluation.statistics import interval
from trajshift.recipes.recipe import load
from trajshift.runs.collect_rows import setting_of
from trajshift.utils.files import read_jsonl

RESULTS = Path("results/images")
TARGETS = ("cifar10", "dtd10", "sign_digits")
RATES = (0.03, 0.1)
"""Learning rates of fine-tuning."""
SCRATCH, FINAL = "scratch", "initialization"
"""What `checkpoint` is in rows without meta-training, and in rows from its end."""
Row = dict[str, Any]


def all_rows(results: Path) -> Iterator[Row]:
    """Every fine-tuning from the end of a run, with its `start` and `finetune_lr`."""
    for row in rows_of_runs(results):
        if row["checkpoint"] in (FINAL, SCRATCH):
            yield row
    for row in read_jsonl(results / "candidates.jsonl"):
        yield row | {"start": row["candidate"]}
    for row in read_jsonl(results / "rows.jsonl"):
        if not row["study"].startswith("early"):
            yield row | {"start": row["study"]}


def rows_of_runs(results: Path) -> Iterator[Row]:
    """Every fine-tuning of a target in runs/, from checkpoints too."""
    for run in sorted((results / "runs").iterdir()):
        recipes = {rate: load(run, [f"finetune.lr={rate}"]) for rate in RATES}
        rates = {setting_of(recipes[rate], "targets", target): rate for rate in recipes for target in TARGETS}
        for row in read_jsonl(run / "evaluation.jsonl"):
            if row["setting"] in rates:
                start = SCRATCH if row["checkpoint"] == SCRATCH else row["method"]
                yield row | {"start": start, "finetune_lr": rates[row["setting"]]}


def known_rows(results: Path, starts: Iterable[str]) -> list[Row]:
    """All rows on the targets.

    Raises:
        UsageError: no row is from one of the starts.
    """
    rows = [row for row in all_rows(results) if row["target"] in TARGETS]
    known = dict.fromkeys(row["start"] for row in rows)
    for name in starts:
        if name not in known:
            raise UsageError(f"there is no start {name!r}; use one of: {'; '.join(known)}")
    return rows


def fractions(rows: Iterable[Row], images: int, rate: float) -> dict[Any, dict[int, dict[str, float]]]:
    """Start -> seed -> target -> accuracy from 0 to 1, for the seeds that have all targets."""
    found: dict[Any, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["target"] in TARGETS and (row["train_images"], row["finetune_lr"]) == (images, rate):
            found[row["start"]][row["seed"]][row["target"]] = row["accuracy"]
    return {
        start: {seed: by_target for seed, by_target in seeds.items() if len(by_target) == len(TARGETS)}
        for start, seeds in found.items()
    }


def accuracies(rows: Iterable[Row], images: int, rate: float) -> dict[Any, dict[int, dict[str, float]]]:
    """As `fractions`, in %."""
    return {
        start: {seed: {t: 100 * value for t, value in by_target.items()} for seed, by_target in seeds.items()}
        for start, seeds in fractions(rows, images, rate).items()
    }


def averages(rows: Iterable[Row], images: int, rate: float) -> dict[Any, dict[int, float]]:
    """Start -> seed -> accuracy in %, mean of the targets."""
    return {
        start: {seed: fmean(by_target.values()) for seed, by_target in seeds.items()}
        for start, seeds in accuracies(rows, images, rate).items()
    }


def steps_to_reach(by_steps: dict[int, float], wanted: float) -> float:
    """Inner steps after which `wanted` is first reached, on straight lines between points; infinity if it is not."""
    before = min(by_steps)
    for step, value in sorted(by_steps.items()):
        if value >= wanted:
            share = (wanted - by_steps[before]) / ((value - by_steps[before]) or 1.0)
            return before + share * (step - before)
        before = step
    return inf


def curve(label: str, rows: Iterable[Row], x: str, target: str | None = None) -> Curve:
    """Accuracy (a fraction) against the field `x`, over seeds: on one target, or the mean of all."""
    wanted = TARGETS if target is None else (target,)
    cells: dict[float, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["target"] in wanted:
            cells[float(row[x])][row["seed"]][row["target"]] = row["accuracy"]
    points = {}
    for place, seeds in sorted(cells.items()):
        values = [sum(cell.values()) / len(cell) for cell in seeds.values() if len(cell) == len(wanted)]
        if values:
            points[place] = interval(values)
    return Curve(label=label, x=tuple(points), y=tuple(points.values()))


def summary(rows: Iterable[Row], starts: Iterable[str], images: int, rate: float) -> Summary:
    """Starts x targets in one setting, for `comparison_figure`; no tests."""
    by_start = fractions(rows, images, rate)
    lines = []
    for start in starts:
        seeds = by_start[start]
        per_seed = {seed: sum(cell[target] for target in TARGETS) / len(TARGETS) for seed, cell in seeds.items()}
        lines.append(
            Line(
                label=start,
                method=start,
                inner_steps=2000,
                seeds=tuple(seeds),
                targets={target: interval([cell[target] for cell in seeds.values()]) for target in TARGETS},
                average=interval([*per_seed.values()]),
                per_seed=per_seed,
            )
        )
    return Summary(metric="accuracy", train_images=images, steps=(300,), targets=TARGETS, lines=tuple(lines), tests=())
