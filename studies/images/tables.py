"""Prints the tables of results/images/README.md, and draws its figures, from the rows kept there.

    python -m studies.images.tables                       # the rates tried, for every method
    python -m studies.images.tables REFERENCE START...    # averages, and differences to REFERENCE
    python -m studies.images.tables --targets START...    # every target, in each of four settings
    python -m studies.images.tables --draw START...       # draws methods.svg
    python -m studies.images.tables --horizon             # shifting and Reptile at each K; draws horizon.svg
    python -m studies.images.tables --leads A B C D       # A - B beside C - D, and how they differ
    python -m studies.images.tables --soon                # how soon shifting is where Reptile ends; draws soon.svg

A start is a method of runs/, a candidate of candidates.jsonl or a study of rows.jsonl, such as trajectory-shifting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from studies.command import new_app, run_app
from studies.images.rows import (
    FINAL,
    RESULTS,
    TARGETS,
    Row,
    accuracies,
    averages,
    curve,
    known_rows,
    rows_of_runs,
    steps_to_reach,
    summary,
)
from trajshift.errors import UsageError
from trajshift.evaluation.comparison import Curve, show_p
from trajshift.evaluation.statistics import Estimate, PairedTest, compare, holm, interval, paired_test, show
from trajshift.report.figures import comparison_figure, curve_figure, looks, save
from trajshift.utils.files import read_jsonl

HORIZONS = {
    "trajectory-shifting": {20: "horizon-20", 200: "trajectory-shifting", 1000: "horizon-1000"},
    "reptile": {20: "reptile-horizon-20", 200: "reptile", 1000: "reptile-horizon-1000"},
}
"""Method -> K -> start."""
SETTINGS = ((1000, 0.1), (250, 0.1), (1000, 0.03), (250, 0.03))
"""Training images and fine-tuning rate, a column each."""
COLUMNS = " | ".join(f"{images:,} images, rate {rate}" for images, rate in SETTINGS)


def print_targets(results: Path, starts: Sequence[str]) -> None:
    """Prints a table for each setting: start x target, mean and interval over seeds."""
    rows = known_rows(results, starts)
    for images, rate in SETTINGS:
        found = accuracies(rows, images, rate)
        print(f"\n**Up to {images:,} images, rate {rate}**\n\n| start | seeds | {' | '.join(TARGETS)} |\n|{'---|' * 5}")
        for start in starts:
            seeds = list(found[start].values())
            cells = [show(interval([by_target[target] for by_target in seeds]), 2) for target in TARGETS]
            print(f"| {start} | {len(seeds)} | {' | '.join(cells)} |")


def print_differences(results: Path, reference: str, starts: Sequence[str]) -> None:
    """Prints averages, then every start minus the reference, as `points (p; p after Holm)`."""
    rows = known_rows(results, [reference, *starts])
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


def print_rates(results: Path) -> None:
    """Prints the score of every pair of rates: accuracy on mnist in %, mean of the three sizes; the best is bold."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in read_jsonl(results / "tuning.jsonl"):
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


def print_way_to_reptile(results: Path, figures: Path) -> None:
    """Prints shifting's accuracy against inner steps, and how much sooner it has Reptile's last one; draws soon.svg."""
    rows = [row for row in rows_of_runs(results) if (row["train_images"], row["finetune_lr"]) == (1000, 0.1)]
    reptile = [row for row in rows if row["start"] == "reptile" and row["checkpoint"] == FINAL]
    late = [row for row in rows if row["start"] == "trajectory-shifting" and row["inner_steps"] > 1000]
    early = [row for row in read_jsonl(results / "rows.jsonl") if row["study"].startswith("early")]
    shifting = [row | {"start": row["inner_steps"]} for row in early + late]
    draw_way_to_reptile(figures, reptile, shifting)
    last, by_steps = averages(reptile, 1000, 0.1)["reptile"], averages(shifting, 1000, 0.1)
    steps = sorted(by_steps)
    print("| inner steps | trajectory-shifting | minus Reptile after 2,000 |\n|---|---|---|")
    for step in steps:
        behind = interval([value - last[seed] for seed, value in by_steps[step].items()])
        print(f"| {step:,} | {show(interval([*by_steps[step].values()]), 2)} | {show(behind, 2, signed=True)} |")
    factors = []
    for seed, wanted in sorted(last.items()):
        factors.append(steps[-1] / steps_to_reach({step: by_steps[step][seed] for step in steps}, wanted))
    print(f"\nfactor {show(interval(factors), 2)}, seeds: " + ", ".join(f"{factor:.2f}" for factor in factors))


def print_horizons(results: Path, figures: Path) -> None:
    """Prints both methods and their paired difference at each K, p corrected over a column; draws horizon.svg."""
    rows = known_rows(results, [start for by_k in HORIZONS.values() for start in by_k.values()])
    draw_horizons(figures, rows)
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


def print_leads(results: Path, starts: Sequence[str]) -> None:
    """Prints a - b, c - d and the difference between the two, p uncorrected."""
    rows = known_rows(results, starts)
    by_setting = [averages(rows, images, rate) for images, rate in SETTINGS]
    a, b, c, d = starts
    print(f"| difference (points) | seeds | {COLUMNS} |\n|{'---|' * 6}")
    for name, tests in (
        (f"{a} - {b}", [paired_test(found[a], found[b]) for found in by_setting]),
        (f"{c} - {d}", [paired_test(found[c], found[d]) for found in by_setting]),
        ("the first - the second", [lead_change(found, *starts) for found in by_setting]),
    ):
        print(f"| {name} | {tests[0].count} | {' | '.join(map(with_p, tests))} |")


def lead(found: Mapping[str, Mapping[int, float]], first: str, second: str) -> dict[int, float]:
    """first - second by seed, for the seeds that both have."""
    return {seed: found[first][seed] - found[second][seed] for seed in found[first].keys() & found[second].keys()}


def lead_change(found: Mapping[str, Mapping[int, float]], *starts: str) -> PairedTest:
    """Of four starts a, b, c and d: a - b against c - d, seed by seed."""
    a, b, c, d = starts
    return paired_test(lead(found, a, b), lead(found, c, d))


def with_p(test: PairedTest) -> str:
    """Points and p."""
    return show(test.difference, 2, signed=True) + ("" if test.p is None else f" ({show_p(test.p)})")


def with_holm(test: PairedTest) -> str:
    """p and p after Holm, behind a number."""
    return "" if test.p is None or test.p_holm is None else f" ({show_p(test.p)}; {show_p(test.p_holm)})"


# -- figures ---------------------------------------------------------------------------------------------------


def save_svg(figure: Any, name: str, folder: Path) -> None:
    """Writes only `folder/name.svg`."""
    save(figure, name, folder)
    (folder / f"{name}.png").unlink()


def draw_methods(results: Path, figures: Path, starts: Sequence[str]) -> None:
    """Draws methods.svg: every start on every target, 1,000 images, rate 0.03, at which none breaks down."""
    shown = summary(known_rows(results, starts), starts, images=1000, rate=0.03)
    save_svg(comparison_figure(shown, looks(starts)), "methods", figures)


def draw_horizons(figures: Path, rows: Sequence[Row]) -> None:
    """Draws horizon.svg: the average over targets of both methods against K, in each of four settings."""
    horizon_of = {start: k for by_k in HORIZONS.values() for k, start in by_k.items()}
    panels: dict[str, list[Curve]] = {}
    for images, rate in SETTINGS:
        chosen = [row for row in rows if (row["train_images"], row["finetune_lr"]) == (images, rate)]
        panels[f"{images:,} images, rate {rate}"] = [
            curve(
                method,
                (row | {"horizon": horizon_of[row["start"]]} for row in chosen if row["start"] in by_k.values()),
                "horizon",
            )
            for method, by_k in reversed(HORIZONS.items())  # shifting's line above Reptile's
        ]
    figure = curve_figure(panels, looks([*HORIZONS]), metric="accuracy", xlabel="horizon K", log=True)
    save_svg(figure, "horizon", figures)


def draw_way_to_reptile(figures: Path, reptile: Iterable[Row], shifting: Sequence[Row]) -> None:
    """Draws soon.svg: shifting against inner steps, Reptile's last accuracy as a level."""
    panels, levels, level = {}, {}, "reptile after 2,000"
    reptile = list(reptile)
    for target in (None, *TARGETS):
        panels[target or "average"] = [curve("trajectory-shifting", shifting, "inner_steps", target)]
        levels[target or "average"] = {level: curve(level, reptile, "inner_steps", target).y[-1]}
    styles = looks(["trajectory-shifting", level])
    figure = curve_figure(panels, styles, metric="accuracy", xlabel="inner steps", levels=levels)
    save_svg(figure, "soon", figures)


# -- the command -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def tables(
    starts: Annotated[list[str] | None, typer.Argument(metavar="START", help="What is compared.")] = None,
    targets: Annotated[bool, typer.Option("--targets", help="Every target by itself.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Draw methods.svg.")] = False,
    horizon: Annotated[bool, typer.Option("--horizon", help="Shifting and Reptile at each K; draws a figure.")] = False,
    leads: Annotated[bool, typer.Option("--leads", help="Of four starts, A - B beside C - D.")] = False,
    soon: Annotated[
        bool, typer.Option("--soon", help="How soon shifting is where Reptile ends; draws a figure.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures; default that of the rows.")] = None,
) -> None:
    """Print tables of the image study: the rates tried, or averages and differences to the first START named."""
    names = starts or []
    if targets + draw + horizon + leads + soon > 1:
        raise UsageError("--targets, --draw, --horizon, --leads and --soon exclude each other; give one")
    if (targets or draw) and not names:
        raise UsageError("no start was named; name at least one, such as trajectory-shifting")
    if leads and len(names) != 4:
        raise UsageError(f"--leads compares four starts, A B C D, and {len(names)} were named")
    if targets:
        print_targets(results, names)
    elif draw:
        draw_methods(results, figures or results, names)
    elif horizon:
        print_horizons(results, figures or results)
    elif leads:
        print_leads(results, names)
    elif soon:
        print_way_to_reptile(results, figures or results)
    elif names:
        print_differences(results, names[0], names[1:])
    else:
        print_rates(results)


if __name__ == "__main__":
    run_app(app, "studies.images.tables")
