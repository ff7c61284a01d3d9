"""Prints the tables of results/images/README.md from the rows kept in results/images.

Command: python studies/images/tables.py                                    # the rates tried, for every method
         python studies/images/tables.py REFERENCE START...                 # averages, and differences to REFERENCE
         python studies/images/tables.py --targets START...                 # every target, in each of four settings
         python studies/images/tables.py --draw START...                    # draws methods.svg
         python studies/images/tables.py --horizon                          # shifting and Reptile at each K;
                                                                            # draws horizon.svg
         python studies/images/tables.py --leads A B C D                    # A - B beside C - D, and how they differ
         python studies/images/tables.py --soon                             # shifting's way to Reptile's last accuracy;
                                                                            # draws soon.svg

A start is a method of runs/, a candidate of candidates.jsonl or a study of rows.jsonl, such as trajectory-shifting.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from math import inf
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from trajshift.evaluation.comparison import curves, summary_table
from trajshift.evaluation.evaluation_row import EvaluationRow
from trajshift.evaluation.statistics import Estimate, PairedTest, compare, holm, interval, paired_test, show, show_p
from trajshift.recipes.recipe import load
from trajshift.report.figures import comparison_figure, curve_figure, looks, save
from trajshift.runs.evaluation_rows import read_evaluation, setting_of
from trajshift.utils.files import read_jsonl

RESULTS = Path(__file__).parents[2] / "results" / "images"
TARGETS = ("cifar10", "dtd10", "sign_digits")
HORIZONS = {
    "trajectory-shifting": {20: "horizon-20", 200: "trajectory-shifting", 1000: "horizon-1000"},
    "reptile": {20: "reptile-horizon-20", 200: "reptile", 1000: "reptile-horizon-1000"},
}
"""Method -> K -> start."""
SETTINGS = ((1000, 0.1), (250, 0.1), (1000, 0.03), (250, 0.03))
COLUMNS = " | ".join(f"{images:,} images, rate {rate}" for images, rate in SETTINGS)
FINAL, SCRATCH = "initialization", "scratch"
Row = dict[str, Any]


def typed(row: Row, **changes: Any) -> EvaluationRow:
    """A row as the package's own tables and figures take it; those kept here lack what is the same in all of them."""
    same = {"checkpoint": FINAL, "method": row["start"], "inner_steps": 2000, "steps": 300}
    return EvaluationRow.from_json(same | row | changes)


def all_rows() -> Iterator[Row]:
    """Every fine-tuning from the end of a run, with its `start` and `finetune_lr`."""
    for row in rows_of_runs():
        if row["checkpoint"] in (FINAL, SCRATCH):
            yield row
    for row in read_jsonl(RESULTS / "candidates.jsonl"):
        yield row | {"start": row["candidate"]}
    for row in read_jsonl(RESULTS / "rows.jsonl"):
        if not row["study"].startswith("early"):
            yield row | {"start": row["study"]}


def rows_of_runs() -> Iterator[Row]:
    """Every fine-tuning of a target in runs/, from checkpoints too."""
    for run in sorted((RESULTS / "runs").iterdir()):
        recipes = {rate: load(run, [f"finetune.lr={rate}"]) for rate in (0.03, 0.1)}
        rates = {setting_of(recipes[rate], "targets", target): rate for rate in recipes for target in TARGETS}
        for row in (one.to_json() for one in read_evaluation(run)):
            if row["setting"] in rates:
                start = SCRATCH if row["checkpoint"] == SCRATCH else row["method"]
                yield row | {"start": start, "finetune_lr": rates[row["setting"]]}


def accuracies(rows: Iterable[Row], images: int, rate: float) -> dict[Any, dict[int, dict[str, float]]]:
    """Start -> seed -> target -> accuracy in %, where all three targets are there."""
    found: dict[Any, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["target"] in TARGETS and (row["train_images"], row["finetune_lr"]) == (images, rate):
            found[row["start"]][row["seed"]][row["target"]] = 100 * row["accuracy"]
    return {
        start: {seed: by_target for seed, by_target in seeds.items() if len(by_target) == len(TARGETS)}
        for start, seeds in found.items()
    }


def averages(rows: Iterable[Row], images: int, rate: float) -> dict[Any, dict[int, float]]:
    """Start -> seed -> mean of the three targets."""
    return {
        start: {seed: fmean(by_target.values()) for seed, by_target in seeds.items()}
        for start, seeds in accuracies(rows, images, rate).items()
    }


def known_rows(starts: Iterable[str]) -> list[Row]:
    """All rows; refuses a start that none is from."""
    rows = list(all_rows())
    known = dict.fromkeys(row["start"] for row in rows if row["target"] in TARGETS)
    for name in starts:
        if name not in known:
            print(f"tables.py: no start {name!r}; there are {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    return rows


def of_targets(starts: list[str]) -> None:
    """Prints a table for each setting: start x target, mean and interval over seeds."""
    rows = known_rows(starts)
    for images, rate in SETTINGS:
        found = accuracies(rows, images, rate)
        print(f"\n**Up to {images:,} images, rate {rate}**\n\n| start | seeds | {' | '.join(TARGETS)} |\n|{'---|' * 5}")
        for start in starts:
            seeds = list(found[start].values())
            cells = [show(interval([by_target[target] for by_target in seeds]), 2) for target in TARGETS]
            print(f"| {start} | {len(seeds)} | {' | '.join(cells)} |")


def draw_methods(starts: list[str]) -> None:
    """Draws methods.svg: every start on every target, 1,000 images, rate 0.03, at which none breaks down."""
    chosen = [
        typed(row, label=row["start"], inner_steps=2000, steps=300, setting=row.get("setting"))
        for row in known_rows(starts)
        if row["target"] in TARGETS and row["start"] in starts and row["finetune_lr"] == 0.03
    ]
    chosen.sort(key=lambda row: (starts.index(row.label), TARGETS.index(row.target), row.seed))
    summary = summary_table(chosen, train_images=1000)
    save(comparison_figure(summary, looks(starts)), "methods", RESULTS)
    (RESULTS / "methods.png").unlink()


def compared(reference: str, starts: list[str]) -> None:
    """Prints averages, then every start minus the reference, as `points (p; p after Holm)`."""
    rows = known_rows([reference, *starts])
    by_setting = [averages(rows, images, rate) for images, rate in SETTINGS]
    print(f"| start | seeds | {COLUMNS} |\n|{'---|' * 6}")
    for start in (reference, *starts):
        seeds = len(by_setting[0][start])
        print(
            f"| {start} | {seeds} | " + " | ".join(show(interval([*a[start].values()]), 2) for a in by_setting) + " |"
        )
    print(f"\n| difference (points) | {COLUMNS} |\n|{'---|' * 5}")
    tests = [compare({name: a[name] for name in (reference, *starts)}, reference) for a in by_setting]
    for position, start in enumerate(starts):
        cells = []
        for family in tests:
            test = family[position]
            d = test.difference
            turned = None if d is None else Estimate(mean=-d.mean, half_width=d.half_width, count=d.count)
            cells.append(show(turned, 2, signed=True) + with_holm(test))
        print(f"| {start} - {reference} | " + " | ".join(cells) + " |")


def tuned() -> None:
    """Prints the score of every pair of rates: accuracy on mnist in %, mean of the three sizes; the best is bold."""
    found: dict[tuple[str, int, float, float, float, float], list[float]] = defaultdict(list)
    for row in read_jsonl(RESULTS / "tuning.jsonl"):
        chosen = (row["inner_lr"], row["meta_lr"] or 0.0, row.get("strength", 0.0), row["finetune_lr"])
        method = f"{row['method']}, {row['pair']} pair" if "pair" in row else row["method"]
        place = (method, row["horizon"], *chosen)
        found[place].append(100 * row["accuracy"])
    done = {place[:5] for place in found if all(len(found.get((*place[:5], rate), ())) == 3 for rate in (0.1, 0.03))}
    scores = {place: fmean(values) for place, values in found.items() if place[:5] in done}
    best = {max(group, key=scores.__getitem__) for _, group in groupby(sorted(scores), key=itemgetter(0, 1))}
    print("| method | K | inner rate | meta_lr | fine-tuning rate 0.1 | 0.03 |\n|---|---|---|---|---|---|")
    for method, horizon, inner_lr, meta_lr, strength in sorted({place[:5] for place in scores}):
        cells = []
        for rate in (0.1, 0.03):
            place = (method, horizon, inner_lr, meta_lr, strength, rate)
            cells.append(f"**{scores[place]:.2f}**" if place in best else f"{scores[place]:.2f}")
        name = f"{method}, lambda {strength:g}" if strength else method
        rates = f"{inner_lr:g} | {f'{meta_lr:g}' if meta_lr else '-'}"
        print(f"| {name} | {horizon} | {rates} | {' | '.join(cells)} |")


def soon() -> None:
    """Prints shifting's accuracy against inner steps, and by which factor it is sooner at Reptile's last one."""
    rows = [row for row in rows_of_runs() if (row["train_images"], row["finetune_lr"]) == (1000, 0.1)]
    reptile = [row for row in rows if row["start"] == "reptile" and row["checkpoint"] == FINAL]
    late = [row for row in rows if row["start"] == "trajectory-shifting" and row["inner_steps"] > 1000]
    early = [row for row in read_jsonl(RESULTS / "rows.jsonl") if row["study"].startswith("early")]
    shifting = [row | {"start": row["inner_steps"], "label": "trajectory-shifting"} for row in early + late]
    draw_soon(reptile, shifting)
    last, by_steps = averages(reptile, 1000, 0.1)["reptile"], averages(shifting, 1000, 0.1)
    steps = sorted(by_steps)
    print("| inner steps | trajectory-shifting | minus Reptile after 2,000 |\n|---|---|---|")
    for step in steps:
        behind = interval([value - last[seed] for seed, value in by_steps[step].items()])
        print(f"| {step:,} | {show(interval([*by_steps[step].values()]), 2)} | {show(behind, 2, signed=True)} |")
    factors = []
    for seed, wanted in sorted(last.items()):
        factors.append(steps[-1] / reached({step: by_steps[step][seed] for step in steps}, wanted))
    print(f"\nfactor {show(interval(factors), 2)}, seeds: " + ", ".join(f"{factor:.2f}" for factor in factors))


def reached(by_steps: dict[int, float], wanted: float) -> float:
    """Inner steps after which `wanted` is first reached, on straight lines between points; infinity where it is not."""
    before = min(by_steps)
    for step, value in sorted(by_steps.items()):
        if value >= wanted:
            share = (wanted - by_steps[before]) / ((value - by_steps[before]) or 1.0)
            return before + share * (step - before)
        before = step
    return inf


def horizons() -> None:
    """Prints both methods and their paired difference at each K, p corrected over a column; draws horizon.svg."""
    places = {start: (method, k) for method, by_k in HORIZONS.items() for k, start in by_k.items()}
    rows = known_rows(places)
    print(f"| K | start | seeds | {COLUMNS} |\n|{'---|' * 7}")
    by_setting = [averages(rows, images, rate) for images, rate in SETTINGS]
    shifting, reptile = HORIZONS.values()
    tests = [[paired_test(found[shifting[k]], found[reptile[k]]) for k in shifting] for found in by_setting]
    corrected = [holm([test.p or 0.0 for test in column]) for column in tests]
    for place, k in enumerate(shifting):
        for method, by_k in HORIZONS.items():
            cells = [show(interval([*found[by_k[k]].values()]), 2) for found in by_setting]
            print(f"| {k:,} | {method} | {len(by_setting[0][by_k[k]])} | {' | '.join(cells)} |")
        cells = [
            f"{show(column[place].difference, 2, signed=True)} ({show_p(column[place].p or 0.0)}; {show_p(ps[place])})"
            for column, ps in zip(tests, corrected, strict=True)
        ]
        print(f"| {k:,} | shifting - Reptile | {tests[0][place].count} | {' | '.join(cells)} |")
    four = [start[k] for k in (1000, 20) for start in (shifting, reptile)]
    changes = [lead_change(found, *four) for found in by_setting]
    print(f"| 1,000 - 20 | shifting - Reptile | {changes[0].count} | {' | '.join(map(with_p, changes))} |")
    draw_horizons(rows, places)


def lead(found: dict[str, dict[int, float]], first: str, second: str) -> dict[int, float]:
    """first - second by seed, where both have it."""
    return {seed: found[first][seed] - found[second][seed] for seed in found[first].keys() & found[second]}


def lead_change(found: dict[str, dict[int, float]], *starts: str) -> PairedTest:
    """Of four starts a, b, c and d: a - b against c - d, seed by seed."""
    a, b, c, d = starts
    return paired_test(lead(found, a, b), lead(found, c, d))


def leads(*starts: str) -> None:
    """Prints a - b, c - d and the difference between the two; p as it is."""
    rows = known_rows(starts)
    by_setting = [averages(rows, images, rate) for images, rate in SETTINGS]
    a, b, c, d = starts
    print(f"| difference (points) | seeds | {COLUMNS} |\n|{'---|' * 6}")
    for name, tests in (
        (f"{a} - {b}", [paired_test(found[a], found[b]) for found in by_setting]),
        (f"{c} - {d}", [paired_test(found[c], found[d]) for found in by_setting]),
        ("the first - the second", [lead_change(found, *starts) for found in by_setting]),
    ):
        print(f"| {name} | {tests[0].count} | {' | '.join(map(with_p, tests))} |")


def with_p(test: PairedTest) -> str:
    """Points and p."""
    return show(test.difference, 2, signed=True) + ("" if test.p is None else f" ({show_p(test.p)})")


def with_holm(test: PairedTest) -> str:
    """p and p after Holm, behind a number."""
    return "" if test.p is None or test.p_holm is None else f" ({show_p(test.p)}; {show_p(test.p_holm)})"


def draw_horizons(rows: Iterable[Row], places: dict[str, tuple[str, int]]) -> None:
    """Draws horizon.svg: the average over targets of both methods against K, in each of four settings."""
    chosen = [row for row in rows if row["start"] in places and row["target"] in TARGETS]
    panels = {
        f"{images:,} images, rate {rate}": curves(
            [
                (places[row["start"]][1], typed(row, label=places[row["start"]][0]))
                for row in chosen
                if (row["train_images"], row["finetune_lr"]) == (images, rate)
            ],
            metric="accuracy",
        )
        for images, rate in SETTINGS
    }
    figure = curve_figure(panels, looks([*HORIZONS]), metric="accuracy", xlabel="horizon K", log=True)
    save(figure, "horizon", RESULTS)
    (RESULTS / "horizon.png").unlink()


def draw_soon(reptile: list[Row], shifting: list[Row]) -> None:
    """Draws soon.svg: shifting against inner steps, Reptile's last accuracy as a level."""
    panels, levels, level = {}, {}, "reptile after 2,000"
    for target in (None, *TARGETS):
        curve = partial(curves, metric="accuracy", target=target)
        panels[target or "average"] = curve([(row["inner_steps"], typed(row)) for row in shifting])
        levels[target or "average"] = {level: curve([(row["inner_steps"], typed(row)) for row in reptile])[0].y[-1]}
    styles = looks(["trajectory-shifting", level])
    save(curve_figure(panels, styles, metric="accuracy", xlabel="inner steps", levels=levels), "soon", RESULTS)
    (RESULTS / "soon.png").unlink()


if __name__ == "__main__":
    if sys.argv[1:] == ["--soon"]:
        soon()
    elif sys.argv[1:] == ["--horizon"]:
        horizons()
    elif sys.argv[1:2] == ["--leads"] and len(sys.argv) == 6:
        leads(*sys.argv[2:])
    elif sys.argv[1:2] == ["--targets"]:
        of_targets(sys.argv[2:])
    elif sys.argv[1:2] == ["--draw"]:
        draw_methods(sys.argv[2:])
    elif len(sys.argv) > 1:
        compared(sys.argv[1], sys.argv[2:])
    else:
        tuned()
