"""The results in a report: the comparison, accuracy against inner steps, Reptile's accuracy reached, few data.

Each figure is saved as SVG and PNG, each table as CSV (numbers) and Markdown (text), beside the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trajshift.evaluation.comparison import AVERAGE, FINAL, UNTRAINED, Row, Summary, curves, show_p, summary_tables
from trajshift.evaluation.statistics import PairedTest
from trajshift.evaluation.steps_to_match import steps_to_match_table
from trajshift.report import figures
from trajshift.report.page import Page
from trajshift.report.tables import (
    curves_csv,
    curves_markdown,
    steps_to_match_csv,
    summary_csv,
    tests_csv,
    write_markdown,
)

_TESTS = (
    "Paired t-tests over seeds of the average over targets, first minus second with its 95% interval; "
    "p corrected by Holm for all pairs in this table."
)


def comparison(page: Page, rows: Sequence[Row], styles: figures.Looks, folder: Path) -> Summary | None:
    """The comparison at the end of meta-training; returns the first table's summary."""
    page.heading("Fine-tuning on the targets")
    ends = [row for row in rows if row["checkpoint"] in (FINAL, *UNTRAINED)]
    if not ends:
        page.paragraph("These runs have not been evaluated yet: trajshift evaluate RUN... fine-tunes their targets.")
        return None
    found = summary_tables(rows)
    page.paragraph(verdict(found[0]), "lead")
    for number, summary in enumerate(found):
        if len(found) > 1:
            page.heading(_capital(summary.title), 3)
        if number == 0:
            svg = figures.save(figures.comparison_figure(summary, styles), "comparison", folder)
            page.figure(svg, f"{_capital(summary.title)}: mean and 95% t-interval over seeds; dots are seeds.")
        caption = f"{_capital(summary.title)}, \u00b1 95% t-interval over seeds."
        page.table(summary.header(), summary.cells(), caption)
        suffix = f"-{number + 1}" if number else ""
        summary_csv(folder / f"comparison{suffix}.csv", summary)
        write_markdown(folder / f"comparison{suffix}.md", summary.header(), summary.cells(), caption)
        if summary.tests:
            page.table(summary.test_header(), summary.test_cells(), _TESTS, text=(1,))
            tests_csv(folder / f"tests{suffix}.csv", summary)
            about = f"{_capital(summary.title)}. {_TESTS}"
            write_markdown(folder / f"tests{suffix}.md", summary.test_header(), summary.test_cells(), about)
        for note in summary.notes:
            page.paragraph(_capital(note) + ".", "note")
    elsewhere = {row["label"] for row in ends} - {line.label for line in found[0].lines}
    if elsewhere:
        names = ", ".join(sorted(elsewhere))
        page.paragraph(f"Fine-tuned with other sizes or steps, and so not in the first table: {names}.", "note")
    return found[0]


def like(rows: Sequence[Row], final: Summary) -> list[Row]:
    """The rows whose model, data and fine-tuning are those behind the same label in the comparison.

    Nothing else may lie on one curve. A label that has no end yet, a run that is not finished, may be like any other's.
    """
    own: dict[tuple[str, str], set[Any]] = {}
    every: dict[str, set[Any]] = {}
    for row in rows:
        end = row["checkpoint"] in (FINAL, *UNTRAINED) and row["steps"] in final.steps
        if end and row.get("train_images") == final.train_images:
            own.setdefault((row["label"], row["target"]), set()).add(row.get("setting"))
            every.setdefault(row["target"], set()).add(row.get("setting"))
    return [
        row
        for row in rows
        if row.get("setting") in own.get((row["label"], row["target"]), every.get(row["target"], set()))
    ]


def verdict(summary: Summary) -> str:
    """One sentence on who is best and from whom it can be told apart."""
    better = max if summary.metric == "accuracy" else min
    ranked = [line for line in summary.lines if line.average is not None]
    if not ranked:
        return "No method has a complete result yet."
    best = better(ranked, key=lambda line: line.average.mean if line.average else 0.0)
    unit = " %" if summary.percent else ""
    text = f"Best on average is {best.label} with {summary.show(best.average)}{unit} ({summary.metric})"
    told = [test for test in summary.tests if best.label in (test.first, test.second) and test.p_holm is not None]
    if len(ranked) == 1:
        return f"{best.label}: {summary.show(best.average)}{unit} test {summary.metric} on average over the targets."
    if not told:
        return f"{text}; there are too few seeds to test the difference from the others."
    apart = [f"{_other(t, best.label)} (p = {show_p(t.p_holm or 0.0)})" for t in told if (t.p_holm or 0.0) < 0.05]
    close = [f"{_other(t, best.label)} (p = {show_p(t.p_holm or 0.0)})" for t in told if (t.p_holm or 0.0) >= 0.05]
    parts = [f"it differs from {', '.join(apart)}"] if apart else []
    parts += [f"it cannot be told apart from {', '.join(close)}"] if close else []
    return f"{text}; at the 5% level, Holm-corrected, {' and '.join(parts)}."


def _other(test: PairedTest, label: str) -> str:
    return test.second if test.first == label else test.first


def against_steps(page: Page, rows: Sequence[Row], final: Summary, styles: figures.Looks, folder: Path) -> None:
    """What fine-tuning reaches from every checkpoint, and when each method is as good as Reptile at its end."""
    page.heading("Accuracy against inner steps" if final.percent else f"Test {final.metric} against inner steps")
    trained = [row for row in rows if row["checkpoint"] not in UNTRAINED and row["steps"] in final.steps]
    chosen = [row for row in trained if row.get("train_images") == final.train_images]
    if len({row["inner_steps"] for row in chosen}) < 2:
        page.paragraph(
            "Only the end of meta-training was evaluated: trajshift evaluate --checkpoints fine-tunes from the saved "
            "checkpoints too (output.keep=null keeps them all)."
        )
        return
    panels = {name: curves(chosen, "inner_steps", metric=final.metric, target=name) for name in final.targets}
    untrained = [line for line in final.lines if line.label in UNTRAINED]
    levels = {name: {line.label: line.targets[name] for line in untrained if name in line.targets} for name in panels}
    if len(final.targets) > 1:
        panels[AVERAGE] = curves(chosen, "inner_steps", metric=final.metric)
        levels[AVERAGE] = {line.label: line.average for line in untrained if line.average}
    figure = figures.curve_figure(panels, styles, metric=final.metric, xlabel="inner steps per task", levels=levels)
    caption = (
        "Test result after fine-tuning from the initialization reached at a number of inner steps per task (replays "
        "counted): mean and 95% t-interval over seeds."
    )
    page.figure(figures.save(figure, "inner_steps", folder), caption)
    curves_csv(folder / "inner_steps.csv", panels, "inner_steps", final.metric)
    curves_markdown(folder / "inner_steps.md", panels, final.show, caption)
    _reach(page, rows, final, folder)


def _reach(page: Page, rows: Sequence[Row], final: Summary, folder: Path) -> None:
    table = steps_to_match_table(rows, final)
    if table is None:
        return
    page.heading("Inner steps needed to reach Reptile's final result", 3)
    caption = (
        f"Cumulative inner steps per task at the first checkpoint whose mean over seeds is at least as good as that of "
        f"{table.reference} after all its {table.budget:,}, and how many times fewer that is. Checkpoints lie apart, "
        "so each number is an upper bound. Seeds: the fewest and the most that one needs to be as good as "
        f"{table.reference} in that seed."
    )
    cells = [*table.cells(), *table.seed_cells()]
    page.table(table.header(), cells, caption)
    steps_to_match_csv(folder / "reach.csv", table)
    write_markdown(folder / "reach.md", table.header(), cells, caption)


def against_horizon(page: Page, rows: Sequence[Row], final: Summary, horizons: Mapping[str, int], folder: Path) -> None:
    """The result against the horizon K; nothing where no method has several, or one of them with two recipes."""
    ends = [
        row | {"horizon": horizons[row["label"]], "label": row["method"]}
        for row in rows
        if row["checkpoint"] == FINAL and row.get("train_images") == final.train_images and row["steps"] in final.steps
    ]
    tried: dict[str, set[int]] = {}
    for row in ends:
        tried.setdefault(row["method"], set()).add(row["horizon"])
    places = {(row["method"], row["horizon"], row["seed"], row["target"]) for row in ends}
    if len(places) < len(ends) or all(len(found) < 2 for found in tried.values()):
        return
    page.heading("The horizon")
    caption = "Test result after fine-tuning against the horizon K: mean and 95% t-interval over seeds."
    styles, horizon = figures.looks(list(tried)), ("horizon", "horizon", "horizon K")
    _figure_against(page, ends, horizon, final, styles, folder, "horizon", caption)


def few_data(page: Page, rows: Sequence[Row], final: Summary, styles: figures.Looks, folder: Path) -> None:
    """The result against the number of training images, and the gain over the start without meta-training."""
    metric = final.metric
    ends = [row for row in rows if row["checkpoint"] in (FINAL, *UNTRAINED) and row["steps"] in final.steps]
    chosen = [row for row in ends if row.get("images") and (metric in row or "error" in row)]
    if len({row.get("train_images") for row in chosen}) < 2:
        return
    page.heading("Few data")
    caption = (
        "Test result against the number of training images of the target (class-balanced subsets, the same for every "
        "method at one seed): mean and 95% t-interval over seeds."
    )
    images = ("images", "train_images", "training images")
    _figure_against(page, chosen, images, final, styles, folder, "few_data", caption)
    for start in UNTRAINED:
        base = {_cell(row): row for row in chosen if row["label"] == start}
        gains = [
            _gain(row, base[_cell(row)], metric)
            for row in chosen
            if row["label"] not in UNTRAINED and _cell(row) in base
        ]
        if len({row.get("train_images") for row in gains}) > 1:
            name = f"gain_over_{start.replace(' ', '_')}"
            ylabel = f"gain in {metric}{', points' if final.percent else ''}"
            caption = f"The same as a difference from {start}, seed by seed: mean and 95% t-interval over seeds."
            _figure_against(page, gains, images, final, styles, folder, name, caption, ylabel)


def _cell(row: Row) -> tuple[Any, ...]:
    return row["target"], row["seed"], row.get("train_images")


def _gain(row: Row, base: Row, metric: str) -> Row:
    """The row with what it has more of the metric than `base`; where one of the two failed, the failed one."""
    failed = next((one["error"] for one in (row, base) if "error" in one), None)
    if failed is not None:
        return {key: value for key, value in row.items() if key != metric} | {"error": failed}
    return row | {metric: row[metric] - base[metric]}


def _figure_against(
    page: Page,
    rows: Sequence[Row],
    quantity: tuple[str, str, str],
    final: Summary,
    styles: figures.Looks,
    folder: Path,
    name: str,
    caption: str,
    ylabel: str | None = None,
) -> None:
    """Draws and saves the metric against a quantity: its name in the rows, in the CSV and on the axis."""
    x, column, xlabel = quantity
    metric, targets = final.metric, list(dict.fromkeys(row["target"] for row in rows))
    panels = {target: curves(rows, x, metric=metric, target=target) for target in targets}
    average = curves(rows, x, metric=metric)
    if len(targets) > 1 and average:
        panels[AVERAGE] = average
    figure = figures.curve_figure(panels, styles, metric=metric, xlabel=xlabel, ylabel=ylabel, log=True)
    page.figure(figures.save(figure, name, folder), caption)
    curves_csv(folder / f"{name}.csv", panels, column, metric)
    show = final.show if ylabel is None else partial(final.show, signed=True)
    curves_markdown(folder / f"{name}.md", panels, show, caption)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
