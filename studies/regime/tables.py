"""The tables and the figure of results/regime. Below three seeds only means: no interval, no test, no claim."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.images.rows import RATES, SCRATCH, TARGETS, Row, accuracies, averages, curve
from studies.images.tables import save_svg, with_holm
from trajshift.errors import UsageError
from trajshift.evaluation.comparison import Curve
from trajshift.evaluation.statistics import Estimate, compare, interval, show
from trajshift.report.figures import curve_figure, looks
from trajshift.utils.files import read_jsonl

RESULTS = Path("results/regime")
SHIFTING = "trajectory-shifting"
METHODS = (SHIFTING, "reptile", "mtl", "no-shifting", SCRATCH)
IMAGES = 1000
LEAST_SEEDS = 3
"""Seeds below which nothing is claimed."""
Found = Mapping[tuple[int, str], Mapping[int, Any]]
"""(inner steps, method) -> seed -> what was found."""


def print_tables(results: Path, figures: Path) -> None:
    """Prints, for every size, the accuracies, shifting's leads and the training losses; draws accuracy-SIZE.svg.

    Tuned and untuned runs are shown separately, and scratch with both.
    """
    every = read_jsonl(results / "rows.jsonl")
    rows = [row | {"start": (row["inner_steps"], row["method"])} for row in every if "accuracy" in row]
    if not rows:
        print(f"no result yet: {results / 'rows.jsonl'} has no row")
        return
    if len(rows) < len(every):
        print(f"{len(every) - len(rows)} fine-tunings diverged; they are in no table")
    runs = read_jsonl(results / "runs.jsonl")
    for run in runs:
        if "error" in run:
            print(f"{run['method']} of seed {run['seed']} at size {run['size']} diverged in training: {run['error']}")
    refuse_mixed_rates(rows)
    for size in sorted({row["size"] for row in rows}):
        for tuned in (True, False):
            shown = [row for row in rows if row["size"] == size and row["tuned"] in (tuned, None)]
            if all(row["tuned"] is None for row in shown):
                continue
            title = f"Size {size}, rates {'tuned at this size' if tuned else 'not tuned'}"
            for rate in RATES:
                print(f"\n**{title}, fine-tuning rate {rate}**\n")
                print_accuracies(accuracies(shown, IMAGES, rate))
                print_leads(averages(shown, IMAGES, rate))
            print_losses(runs, size, tuned)
            draw(shown, f"accuracy-{size}{'' if tuned else '-untuned'}", figures)


def refuse_mixed_rates(rows: Iterable[Row]) -> None:
    """Refuses rows of one method at one size with several pairs of rates, all tuned or all not.

    Raises:
        UsageError: names the method.
    """
    first: dict[Any, Any] = {}
    for row in rows:
        rates = (row["inner_lr"], row["meta_lr"])
        if first.setdefault((row["size"], row["tuned"], row["method"]), rates) != rates:
            raise UsageError(f"rows of {row['method']} at size {row['size']} have several rates; keep those of one")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval over seeds; the mean alone where they are too few."""
    found = interval(values)
    return found if found.count >= LEAST_SEEDS else replace(found, half_width=None)


def print_accuracies(found: Found) -> None:
    """Prints every start after every kept round: the average and each target."""
    print(f"| inner steps | start | seeds | average | {' | '.join(TARGETS)} |\n|{'---|' * 7}")
    for (step, method), by_seed in sorted(found.items(), key=lambda item: (item[0][0], METHODS.index(item[0][1]))):
        if not by_seed:
            continue
        seeds = [[by_target[target] for target in TARGETS] for by_target in by_seed.values()]
        columns = [[*map(fmean, seeds)], *map(list, zip(*seeds, strict=True))]
        count = f"{len(seeds)}{'' if len(seeds) >= LEAST_SEEDS else ' (too few for a claim)'}"
        print(f"| {step:,} | {method} | {count} | {' | '.join(show(estimate(column), 2) for column in columns)} |")


def print_leads(found: Mapping[tuple[int, str], Mapping[int, float]]) -> None:
    """Prints shifting minus every other method after every kept round, paired by seeds, with p and p after Holm."""
    others = [method for method in METHODS if method not in (SHIFTING, SCRATCH)]
    print("\nShifting minus the others, points (p; p after Holm for the round):\n")
    print(f"| inner steps | {' | '.join(f'minus {other} | seeds' for other in others)} |\n|{'---|' * 7}")
    for step in sorted({step for step, _ in found} - {0}):
        by_method = {method: found.get((step, method), {}) for method in (SHIFTING, *others)}
        common = {other: by_method[SHIFTING].keys() & by_method[other].keys() for other in others}
        enough = [other for other in others if len(common[other]) >= LEAST_SEEDS]
        family = {method: by_method[method] for method in (SHIFTING, *enough)}
        tests = {test.second: test for test in compare(family, SHIFTING)}
        cells = []
        for other in others:
            shown = f"fewer than {LEAST_SEEDS} seeds"
            if other in tests:
                shown = show(tests[other].difference, 2, signed=True) + with_holm(tests[other])
            cells.append(f"{shown} | {len(common[other])}")
        print(f"| {step:,} | {' | '.join(cells)} |")


def print_losses(runs: Iterable[Row], size: str, tuned: bool) -> None:
    """Prints the mean training loss of the sources over the last points before each kept round's end, by method."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if (run["size"], run["tuned"]) == (size, tuned) and "curve" in run:
            points = [fmean(values) for values in zip(*run["curve"]["loss"].values(), strict=True)]
            for end in map(int, run["phi"]):
                last = run["curve"]["step"].index(end) + 1
                found[run["method"]][end].append(fmean(points[max(last - 2, 0) : last]))
    ends = sorted({end for by_end in found.values() for end in by_end})
    if not ends:
        return
    print(f"\n| training loss after | {' | '.join(f'{end:,}' for end in ends)} |\n|{'---|' * (1 + len(ends))}")
    for method in METHODS:
        if method in found:
            cells = [show(estimate(found[method][end]), 2) if found[method][end] else "-" for end in ends]
            print(f"| {method} | {' | '.join(cells)} |")


def draw(rows: Sequence[Row], name: str, figures: Path) -> None:
    """Draws accuracy against inner steps at the first rate, scratch as a level."""
    first = [row for row in rows if row["finetune_lr"] == RATES[0]]
    panels: dict[str, list[Curve]] = {}
    levels: dict[str, dict[str, Estimate]] = {}
    for target in (None, *TARGETS):
        curves = [
            honest(curve(method, [row for row in first if row["method"] == method], "inner_steps", target))
            for method in METHODS
        ]
        panels[target or "average"] = [found for found in curves if found.y and found.label != SCRATCH]
        levels[target or "average"] = {
            found.label: found.y[-1] for found in curves if found.y and found.label == SCRATCH
        }
    figure = curve_figure(panels, looks(METHODS), metric="accuracy", xlabel="inner steps", levels=levels, log=True)
    save_svg(figure, name, figures)


def honest(found: Curve) -> Curve:
    """The curve without bands where seeds are too few."""
    points = tuple(y if y.count >= LEAST_SEEDS else replace(y, half_width=None) for y in found.y)
    return replace(found, y=points)
