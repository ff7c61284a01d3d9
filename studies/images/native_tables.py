"""The tables and the figure of the section on K = 1000 at native sizes (results/images/README.md)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.images.rows import RATES, SCRATCH, TARGETS, Row, accuracies, averages, curve, steps_to_reach
from studies.images.tables import save_svg, with_holm
from trajshift.evaluation.statistics import compare, interval, show
from trajshift.recipes.recipe import load
from trajshift.report.figures import curve_figure, looks
from trajshift.utils.files import read_jsonl

SHIFTING = "trajectory-shifting"
METHODS = (SHIFTING, "mtl", "reptile", "no-shifting", SCRATCH)
ROUND, ROUNDS = 1000, 5
IMAGES = 1000


def print_tables(results: Path, figures: Path) -> None:
    """Prints all starts after every round, shifting's leads, when it is where Reptile ends and the losses; draws."""
    rows = [row | {"start": (row["inner_steps"], row["method"])} for row in read_jsonl(results / "native.jsonl")]
    rows = [row for row in rows if "accuracy" in row]
    for rate in RATES:
        found = {start: by_seed for start, by_seed in accuracies(rows, IMAGES, rate).items() if by_seed}
        print(f"\n**Rate {rate}**\n\n| inner steps | start | seeds | average | {' | '.join(TARGETS)} |\n|{'---|' * 7}")
        for (step, method), by_seed in sorted(found.items()):
            seeds = [[by_target[target] for target in TARGETS] for by_target in by_seed.values()]
            columns = [[*map(fmean, seeds)], *map(list, zip(*seeds, strict=True))]
            cells = [show(interval(column), 2) for column in columns]
            print(f"| {step:,} | {method} | {len(seeds)} | {' | '.join(cells)} |")
        print_leads(averages(rows, IMAGES, rate))
    print_factors(averages(rows, IMAGES, RATES[0]))
    print_losses(results)
    draw(rows, figures)


def print_leads(found: dict[Any, dict[int, float]]) -> None:
    """Prints shifting minus every other method after every round, with p, p after Holm for the round."""
    others = [method for method in METHODS if method not in (SHIFTING, SCRATCH)]
    print(f"\n| inner steps | seeds | {' | '.join(f'minus {other}' for other in others)} |\n|{'---|' * 5}")
    for step in sorted({step for step, _ in found} - {0}):
        tests = compare({method: found.get((step, method), {}) for method in (SHIFTING, *others)}, SHIFTING)
        if not tests[0].count:
            continue
        cells = [show(test.difference, 2, signed=True) + with_holm(test) for test in tests]
        print(f"| {step:,} | {tests[0].count} | {' | '.join(cells)} |")


def print_factors(found: dict[Any, dict[int, float]]) -> None:
    """Prints, seed by seed, how many times sooner shifting has Reptile's accuracy after each round (0: never)."""
    steps = sorted({step for step, _ in found})
    way = {step: found[step, SHIFTING if step else SCRATCH] for step in steps}
    print(f"\n| Reptile after | factor | by seed |\n|{'---|' * 3}")
    for step in steps[1:]:
        factors = []
        for seed, wanted in sorted(found[step, "reptile"].items()):
            of_seed = {at: way[at][seed] for at in steps if seed in way[at]}
            factors.append(step / steps_to_reach(of_seed, wanted))
        mean = show(interval(factors), 2) if all(factors) else "not reached by all"
        print(f"| {step:,} | {mean} | {', '.join(f'{factor:.2f}' for factor in factors)} |")


def print_losses(results: Path) -> None:
    """Prints the training loss over the last 200 steps of each round, mean of the sources, over the seeds."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for run in sorted((results / "native").iterdir()):
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


def draw(rows: list[Row], figures: Path) -> None:
    """Draws native.svg: seeds with all rounds against inner steps, at the first rate, scratch as a level."""
    whole = {row["seed"] for row in rows if row["inner_steps"] == ROUND * ROUNDS}
    first = [row for row in rows if row["seed"] in whole and row["finetune_lr"] == RATES[0]]
    by_method = {method: [row for row in first if row["method"] == method] for method in METHODS}
    panels, levels = {}, {}
    for target in (None, *TARGETS):
        panels[target or "average"] = [
            curve(method, rows, "inner_steps", target) for method, rows in by_method.items() if method != SCRATCH
        ]
        levels[target or "average"] = {SCRATCH: curve(SCRATCH, by_method[SCRATCH], "inner_steps", target).y[-1]}
    figure = curve_figure(panels, looks(METHODS), metric="accuracy", xlabel="inner steps", levels=levels)
    save_svg(figure, "native", figures)
