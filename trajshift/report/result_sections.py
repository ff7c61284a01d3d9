"""The results in a report: the comparison, accuracy against inner steps, Reptile's accuracy reached, few data.

Each figure is saved as SVG and PNG, each table as CSV (numbers) and Markdown (text), beside the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trajshift.evaluation.comparison import AVERAGE, Summary, curves, summary_tables
from trajshift.evaluation.evaluation_row import FINAL, UNTRAINED_LABELS, EvaluationRow
from trajshift.evaluation.statistics import LEVEL, PairedTest, show_p
from trajshift.evaluation.steps_to_match import steps_to_match_table
from trajshift.report import figures
from trajshift.report.page import Page
from trajshift.report.tables import curves_csv, curves_markdown, steps_to_match_csv, summary_csv, tests_csv
from trajshift.utils.files import replace_file
from trajshift.utils.table import Table

_TESTS = (
    "Paired t-tests over seeds of the average over targets, first minus second with its 95% interval; "
    "p corrected by Holm for all pairs in this table."
)


def comparison(page: Page, rows: Sequence[EvaluationRow], styles: figures.Looks, folder: Path) -> Summary | None:
    """The comparison at the end of meta-training; returns the first table's summary."""
    page.heading("Fine-tuning on the targets")
    ends = [row for row in rows if row.start.is_end]
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
        _summary_tables(page, summary, folder, f"-{number + 1}" if number else "")
        for note in summary.notes:
            page.paragraph(_capital(note) + ".", "note")
    elsewhere = {row.label for row in ends} - {line.label for line in found[0].lines}
    if elsewhere:
        names = ", ".join(sorted(elsewhere))
        page.paragraph(f"Fine-tuned with other sizes or steps, and so not in the first table: {names}.", "note")
    return found[0]


def _summary_tables(page: Page, summary: Summary, folder: Path, suffix: str) -> None:
    """Methods x targets and the paired tests, on the page and as files."""
    caption = f"{_capital(summary.title)}, \u00b1 95% t-interval over seeds."
    table = Table(summary.header(), summary.cells(), caption)
    page.table(table)
    summary_csv(folder / f"comparison{suffix}.csv", summary)
    replace_file(folder / f"comparison{suffix}.md", table.markdown())
    if summary.tests:
        tests = Table(summary.test_header(), summary.test_cells(), _TESTS)
        page.table(tests, text=(1,))
        tests_csv(folder / f"tests{suffix}.csv", summary)
        alone = replace(tests, caption=f"{_capital(summary.title)}. {_TESTS}")
        replace_file(folder / f"tests{suffix}.md", alone.markdown())


def like(rows: Sequence[EvaluationRow], final: Summary) -> list[EvaluationRow]:
    """The rows whose model, data and fine-tuning are those behind the same label in the comparison.

    Only such rows may be on one curve. A label with no end yet, as its runs are not finished, is compatible with any.
    """
    own: dict[tuple[str, str], set[str | None]] = {}
    every: dict[str, set[str | None]] = {}
    for row in rows:
        if row.start.is_end and row.steps in final.steps and row.train_images == final.train_images:
            own.setdefault((row.label, row.target), set()).add(row.setting)
            every.setdefault(row.target, set()).add(row.setting)
    return [row for row in rows if row.setting in own.get((row.label, row.target), every.get(row.target, set()))]


def verdict(summary: Summary) -> str:
    """One sentence on which method is best and from which others it can be told apart."""
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
    apart = [f"{_other(t, best.label)} (p = {show_p(t.p_holm or 0.0)})" for t in told if (t.p_holm or 0.0) < LEVEL]
    close = [f"{_other(t, best.label)} (p = {show_p(t.p_holm or 0.0)})" for t in told if (t.p_holm or 0.0) >= LEVEL]
    parts = [f"it differs from {', '.join(apart)}"] if apart else []
    parts += [f"it cannot be told apart from {', '.join(close)}"] if close else []
    return f"{text}; at the 5% level, Holm-corrected, {' and '.join(parts)}."


def _other(test: PairedTest, label: str) -> str:
    return test.second if test.first == label else test.first


def against_steps(
    page: Page, rows: Sequence[EvaluationRow], final: Summary, styles: figures.Looks, folder: Path
) -> None:
    """What fine-tuning reaches from every checkpoint, and when each method is as good as Reptile at its end."""
    page.heading("Accuracy against inner steps" if final.percent else f"Test {final.metric} against inner steps")
    trained = [row for row in rows if row.start.is_meta_trained and row.steps in final.steps]
    chosen = [(row.inner_steps, row) for row in trained if row.train_images == final.train_images]
    if len({steps for steps, _ in chosen}) < 2:
        page.paragraph(
            "Only the end of meta-training was evaluated: trajshift evaluate --checkpoints fine-tunes from the saved "
            "checkpoints too (output.keep=null keeps them all)."
        )
        return
    panels = {name: curves(chosen, metric=final.metric, target=name) for name in final.targets}
    untrained = [line for line in final.lines if line.label in UNTRAINED_LABELS]
    levels = {name: {line.label: line.targets[name] for line in untrained if name in line.targets} for name in panels}
    if len(final.targets) > 1:
        panels[AVERAGE] = curves(chosen, metric=final.metric)
        levels[AVERAGE] = {line.label: line.average for line in untrained if line.average}
    figure = figures.curve_figure(panels, styles, metric=final.metric, xlabel="inner steps per task", levels=levels)
    caption = (
        "Test result after fine-tuning from the initialization reached at a number of inner steps per task (replays "
        "counted): mean and 95% t-interval over seeds."
    )
    page.figure(figures.save(figure, "inner_steps", folder), caption)
    curves_csv(folder / "inner_steps.csv", panels, "inner_steps", final.metric)
    curves_markdown(folder / "inner_steps.md", panels, final.show, caption)
    _steps_to_match(page, rows, final, folder)


def _steps_to_match(page: Page, rows: Sequence[EvaluationRow], final: Summary, folder: Path) -> None:
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
    shown = Table(table.header(), [*table.cells(), *table.seed_cells()], caption)
    page.table(shown)
    steps_to_match_csv(folder / "reach.csv", table)
    replace_file(folder / "reach.md", shown.markdown())


def against_horizon(
    page: Page, rows: Sequence[EvaluationRow], final: Summary, horizons: Mapping[str, int], folder: Path
) -> None:
    """The result against the horizon K; nothing where no method has several, or one of them with two recipes."""
    ends = [
        row
        for row in rows
        if row.start == FINAL and row.train_images == final.train_images and row.steps in final.steps
    ]
    tried: dict[str, set[int]] = {}
    for row in ends:
        tried.setdefault(row.method, set()).add(horizons[row.label])
    places = {(row.method, horizons[row.label], row.seed, row.target) for row in ends}
    if len(places) < len(ends) or all(len(found) < 2 for found in tried.values()):
        return
    page.heading("The horizon")
    caption = "Test result after fine-tuning against the horizon K: mean and 95% t-interval over seeds."
    points = [(horizons[row.label], replace(row, label=row.method)) for row in ends]
    panels = _Against(page, final, figures.looks(list(tried)), folder, column="horizon", xlabel="horizon K")
    panels.draw("horizon", caption, points, points)


def few_data(page: Page, rows: Sequence[EvaluationRow], final: Summary, styles: figures.Looks, folder: Path) -> None:
    """The result against the number of training images, and the gain over the start without meta-training."""
    metric = final.metric
    ends = [row for row in rows if row.start.is_end and row.steps in final.steps]
    chosen = [row for row in ends if row.images and (metric in row.metrics or row.error is not None)]
    if len({row.train_images for row in chosen}) < 2:
        return
    page.heading("Few data")
    caption = (
        "Test result against the number of training images of the target (class-balanced subsets, the same for every "
        "method at one seed): mean and 95% t-interval over seeds."
    )
    panels = _Against(page, final, styles, folder, column="train_images", xlabel="training images")
    panels.draw("few_data", caption, *_by_images(chosen))
    for start in UNTRAINED_LABELS:
        base = {_cell(row): row for row in chosen if row.label == start}
        gains = [
            _gain(row, base[_cell(row)], metric)
            for row in chosen
            if row.label not in UNTRAINED_LABELS and _cell(row) in base
        ]
        if len({row.train_images for row in gains}) > 1:
            ylabel = f"gain in {metric}{', points' if final.percent else ''}"
            caption = f"The same as a difference from {start}, seed by seed: mean and 95% t-interval over seeds."
            panels.draw(f"gain_over_{start.replace(' ', '_')}", caption, *_by_images(gains), ylabel=ylabel)


Points = Sequence[tuple[float | None, EvaluationRow]]
"""A row's position on the x axis, and the row."""


def _by_images(rows: Sequence[EvaluationRow]) -> tuple[Points, Points]:
    """For a target the images it has; for the average those asked for, since targets differ in how many they have."""
    return [(row.images, row) for row in rows], [(row.train_images, row) for row in rows]


def _cell(row: EvaluationRow) -> tuple[str, int, int | None]:
    return row.target, row.seed, row.train_images


def _gain(row: EvaluationRow, base: EvaluationRow, metric: str) -> EvaluationRow:
    """The row with its gain in the metric over `base`; if one of the two failed, the failed one."""
    failed = row.error or base.error
    if failed is not None:
        return replace(row, metrics={}, error=failed)
    return replace(row, metrics={metric: row.metrics[metric] - base.metrics[metric]})


@dataclass(frozen=True, slots=True)
class _Against:
    """Draws the metric against a quantity, and saves figure and tables."""

    page: Page
    final: Summary
    styles: figures.Looks
    folder: Path
    column: str
    """The quantity's name in the CSV."""
    xlabel: str

    def draw(self, name: str, caption: str, of_target: Points, averaged: Points, *, ylabel: str | None = None) -> None:
        """A panel for each target from the points `of_target`, and one for their average from `averaged`."""
        metric, show = self.final.metric, self.final.show
        targets = list(dict.fromkeys(row.target for _, row in of_target))
        panels = {target: curves(of_target, metric=metric, target=target) for target in targets}
        average = curves(averaged, metric=metric)
        if len(targets) > 1 and average:
            panels[AVERAGE] = average
        figure = figures.curve_figure(panels, self.styles, metric=metric, xlabel=self.xlabel, ylabel=ylabel, log=True)
        self.page.figure(figures.save(figure, name, self.folder), caption)
        curves_csv(self.folder / f"{name}.csv", panels, self.column, metric)
        shown = show if ylabel is None else partial(show, signed=True)
        curves_markdown(self.folder / f"{name}.md", panels, shown, caption)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
