"""`report.html` for one run or many, from saved files only; torch is not needed.

The page holds the comparison with intervals and tests, accuracy against inner steps, few-data curves,
training curves, cost, recipe and environment; a part whose files are missing says how to get them. Every
figure is also saved beside the page as SVG and PNG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trajshift import figures
from trajshift.comparison import (
    FINAL,
    SCRATCH,
    Row,
    Summary,
    curves,
    label_runs,
    show_p,
    summary_tables,
)
from trajshift.errors import UsageError
from trajshift.page import Page
from trajshift.rows import collect, read_jsonl
from trajshift.statistics import PairedTest


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run directory holds."""

    path: Path
    label: str
    recipe: dict[str, Any]
    metrics: list[Row]
    timing: list[Row]
    environment: dict[str, Any]

    @property
    def last(self) -> Row:
        """The last row of metrics; empty for a run that logged nothing."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def seconds(self) -> float | None:
        """Wall time of training, where it was written."""
        return float(self.timing[-1]["seconds"]) if self.timing and "seconds" in self.timing[-1] else None


def write_report(paths: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the page for these run directories and returns its path.

    `out` is the HTML file or a folder for it; None is `report.html` in the run, or in the folder above the
    first of several. Figures go to a folder of the page's name beside it. The same files give the same page,
    byte for byte.

    Raises:
        UsageError: no run given, or a path that is no run directory.
    """
    runs = load_runs([Path(path) for path in paths])
    rows, notes = collect([run.path for run in runs])
    target = _page_path(runs, out)
    folder = target.parent / f"{target.stem}-figures"
    styles = figures.looks(list(dict.fromkeys(run.label for run in runs)))
    page = Page(_title(runs))
    page.paragraph(_subtitle(runs), "quiet")
    final = _results(page, rows, styles, folder)
    for note in notes:
        page.paragraph(note, "note")
    if final:
        _against_steps(page, rows, final, styles, folder)
        _few_data(page, rows, final.metric, styles, folder)
    _training(page, runs, styles, folder)
    _cost(page, runs)
    _recipes(page, runs)
    _environment(page, runs)
    _explanation(page)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.html(), encoding="utf-8")
    return target


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads the run directories; every file but the recipe may be missing."""
    if not paths:
        raise UsageError("a report needs at least one run directory")
    recipes = {str(path): _recipe(path) for path in paths}
    labels = label_runs(recipes)
    runs = []
    for path in paths:
        environment = path / "environment.json"
        runs.append(
            Run(
                path=path,
                label=labels[str(path)],
                recipe=recipes[str(path)],
                metrics=read_jsonl(path / "metrics.jsonl"),
                timing=read_jsonl(path / "timing.jsonl"),
                environment=json.loads(environment.read_text()) if environment.exists() else {},
            )
        )
    return runs


def _recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UsageError(f"{path} is no run directory: it has no recipe.yaml; give a folder that trajshift train wrote")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise UsageError(f"{file} holds no recipe; restore it from the run's start")
    return recipe


def _page_path(runs: Sequence[Run], out: Path | str | None) -> Path:
    if out is None:
        return (runs[0].path if len(runs) == 1 else runs[0].path.parent) / "report.html"
    out = Path(out)
    return out if out.suffix.lower() in (".html", ".htm") else out / "report.html"


def _title(runs: Sequence[Run]) -> str:
    labels = list(dict.fromkeys(run.label for run in runs))
    if len(labels) == 1:
        return f"{labels[0]}: {runs[0].path.name}" if len(runs) == 1 else labels[0]
    return f"{len(labels)} methods compared" if len(labels) > 4 else " \u00b7 ".join(labels)


def _subtitle(runs: Sequence[Run]) -> str:
    seeds = sorted({run.recipe.get("seed", 0) for run in runs})
    tasks = list(dict.fromkeys(name for run in runs for name in _task_names(run)))
    return (
        f"{_count(len(runs), 'run')} with {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), "
        f"meta-trained on {_count(len(tasks), 'task')}: {', '.join(tasks)}."
    )


def _task_names(run: Run) -> list[str]:
    return list(run.last.get("tasks") or run.recipe.get("train_on") or run.recipe.get("tasks") or {})


# -- results
# ---------------------------------------------------------------------------------------------------


def _results(page: Page, rows: Sequence[Row], styles: figures.Looks, folder: Path) -> Summary | None:
    """The comparison at the end of meta-training; returns the first table's summary."""
    page.heading("Fine-tuning on the targets")
    if not any(row["checkpoint"] in (FINAL, SCRATCH) for row in rows):
        page.paragraph("These runs have not been evaluated yet: trajshift evaluate RUN... fine-tunes their targets.")
        return None
    found = summary_tables(rows)
    page.paragraph(verdict(found[0]), "lead")
    for number, summary in enumerate(found):
        if len(found) > 1:
            page.heading(summary.title, 3)
        if number == 0:
            svg = figures.save(figures.comparison_figure(summary, styles), "comparison", folder)
            page.figure(svg, f"{_capital(summary.title)}: mean and 95% t-interval over seeds; ticks are seeds.")
        page.table(summary.header(), summary.cells(), f"{_capital(summary.title)}, \u00b1 95% t-interval over seeds.")
        if summary.tests:
            page.table(
                summary.test_header(),
                summary.test_cells(),
                "Paired t-tests over seeds of the average over targets, first minus second with its 95% interval; "
                "p corrected by Holm for all pairs in this table.",
                text=(1,),
            )
        for note in summary.notes:
            page.paragraph(_capital(note) + ".", "note")
    return found[0]


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


def _against_steps(page: Page, rows: Sequence[Row], final: Summary, styles: figures.Looks, folder: Path) -> None:
    page.heading("Accuracy against inner steps" if final.percent else f"Test {final.metric} against inner steps")
    chosen = [row for row in rows if row.get("train_images") == final.train_images and row["checkpoint"] != SCRATCH]
    if len({row["inner_steps"] for row in chosen}) < 2:
        page.paragraph(
            "Only the end of meta-training was evaluated: trajshift evaluate --checkpoints fine-tunes from the saved "
            "checkpoints too (output.keep=null keeps them all)."
        )
        return
    panels = {name: curves(chosen, "inner_steps", metric=final.metric, target=name) for name in final.targets}
    scratch = next((line for line in final.lines if line.label == SCRATCH), None)
    levels = dict(scratch.targets) if scratch else {}
    if len(final.targets) > 1:
        panels["average of targets"] = curves(chosen, "inner_steps", metric=final.metric)
        if scratch and scratch.average:
            levels["average of targets"] = scratch.average
    figure = figures.curve_figure(panels, styles, metric=final.metric, xlabel="inner steps per task", levels=levels)
    caption = (
        "Test result after fine-tuning from the initialization reached at a number of inner steps per task (replays "
        "counted): mean and 95% t-interval over seeds."
    )
    page.figure(figures.save(figure, "inner_steps", folder), caption)


def _few_data(page: Page, rows: Sequence[Row], metric: str, styles: figures.Looks, folder: Path) -> None:
    chosen = [row for row in rows if row["checkpoint"] in (FINAL, SCRATCH) and row.get("images")]
    if len({row.get("train_images") for row in chosen}) < 2:
        return
    page.heading("Few data")
    targets = list(dict.fromkeys(row["target"] for row in chosen))
    panels = {name: curves(chosen, "images", metric=metric, target=name) for name in targets}
    figure = figures.curve_figure(panels, styles, metric=metric, xlabel="training images", log=True)
    caption = (
        "Test result against the number of training images of the target (class-balanced subsets, the same for every "
        "method at one seed): mean and 95% t-interval over seeds."
    )
    page.figure(figures.save(figure, "few_data", folder), caption)


# -- training
# --------------------------------------------------------------------------------------------------

_QUANTITIES = {
    "loss": ("training loss", "Training loss of each task along meta-training"),
    "distance": ("distance to phi", "Euclidean distance between each task's running parameters and phi"),
}


def _training(page: Page, runs: Sequence[Run], styles: figures.Looks, folder: Path) -> None:
    page.heading("Meta-training")
    logged = [run for run in runs if run.metrics]
    if not logged:
        page.paragraph("Nothing was logged yet: metrics.jsonl is empty or missing.")
        return
    note = "Lines are means over seeds, bands their range; long series are averaged in 150 bins."
    for quantity, (ylabel, caption) in _QUANTITIES.items():
        panels: dict[str, dict[str, list[figures.Series]]] = {}
        for run in logged:
            for task in _task_names(run):
                found = [(row["inner_steps"], row["tasks"].get(task, {}).get(quantity)) for row in run.metrics]
                _add(panels.setdefault(task, {}), run.label, found)
        panels = {task: by_label for task, by_label in panels.items() if by_label}
        if panels:
            figure = figures.training_figure(panels, styles, ylabel=ylabel)
            page.figure(figures.save(figure, f"training_{quantity}", folder), f"{caption}. {note}")
    norms: dict[str, list[figures.Series]] = {}
    for run in logged:
        _add(norms, run.label, [(row["inner_steps"], row.get("meta_update_norm")) for row in run.metrics])
    if norms:
        figure = figures.training_figure({"meta-update": norms}, styles, ylabel="norm of the meta-update")
        caption = "Euclidean norm of the last meta-update of phi; where phi moves at every step, each move is small."
        page.figure(figures.save(figure, "meta_update", folder), f"{caption} {note}")


def _add(into: dict[str, list[figures.Series]], label: str, points: Sequence[tuple[Any, Any]]) -> None:
    kept = [(x, y) for x, y in points if y is not None]
    if kept:
        into.setdefault(label, []).append(([float(x) for x, _ in kept], [float(y) for _, y in kept]))


def _cost(page: Page, runs: Sequence[Run]) -> None:
    page.heading("Runs and what they cost")
    rows = []
    for run in runs:
        last = run.last
        rows.append(
            [
                run.label,
                run.path.name,
                str(run.recipe.get("seed", 0)),
                _number(last.get("inner_steps")),
                _number(last.get("gradient_evaluations")),
                _duration(run.seconds),
            ]
        )
    caption = (
        "Inner steps are cumulative per task, replays included; gradient evaluations are summed over all tasks "
        "(held-out passes count 1, Hessian-vector products 2)."
    )
    header = ["method", "run", "seed", "inner steps", "gradient evaluations", "wall time"]
    page.table(header, rows, caption, text=(1,))


def _recipes(page: Page, runs: Sequence[Run]) -> None:
    page.heading("Recipes")
    page.paragraph("Each is complete: trajshift train on the file repeats the run.")
    shown: set[str] = set()
    for run in runs:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)
        if run.label not in shown:
            page.code(text, f"{run.label} ({run.path.name}/recipe.yaml)")
        shown.add(run.label)


def _environment(page: Page, runs: Sequence[Run]) -> None:
    page.heading("Environment")
    texts: dict[str, list[str]] = {}
    for run in runs:
        if run.environment:
            texts.setdefault(json.dumps(run.environment, indent=2, sort_keys=True), []).append(run.path.name)
    if not texts:
        page.paragraph("No environment.json was saved with these runs.")
    for text, names in texts.items():
        environment: Mapping[str, Any] = json.loads(text)
        flat = [[key, _flat(value)] for key, value in environment.items()]
        page.table(["", ", ".join(names)], flat, text=(1,))


def _explanation(page: Page) -> None:
    page.heading("How the numbers are made")
    page.paragraph(
        "A seed is a whole pipeline: start of phi, heads, batches, meta-training, target subset and fine-tuning. "
        "Intervals are two-sided 95% Student t-intervals over seeds; the average takes the mean over targets within "
        "each seed first. Tests are two-sided paired t-tests over the seeds that both methods have, corrected by "
        "Holm's step-down procedure within one table. With one seed there is neither interval nor test. With few "
        "seeds a t-interval leans on normally distributed values, which cannot be checked."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
