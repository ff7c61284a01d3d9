"""The page's sections on meta-training: losses, distances, errors and norms along the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trajshift.report import figures
from trajshift.report.page import Page
from trajshift.report.saved_runs import Run, task_names
from trajshift.report.tables import training_csv, training_markdown

MEAN = "mean of tasks"
_QUANTITIES = {
    "loss": ("training loss", "Training loss of each task along meta-training"),
    "distance": ("distance to phi", "Euclidean distance between each task's running parameters and phi"),
}


def training_section(page: Page, runs: Sequence[Run], styles: figures.Looks, folder: Path) -> None:
    """Losses, distances, approximation errors and the norms of meta-updates, as far as they were logged."""
    page.heading("Meta-training")
    logged = [run for run in runs if run.metrics]
    if not logged:
        page.paragraph("Nothing was logged yet: metrics.jsonl is empty or missing.")
        return
    note = "Lines are means over seeds, bands their range; long series are averaged in 150 bins."
    for quantity, (ylabel, caption) in _QUANTITIES.items():
        panels: dict[str, dict[str, list[figures.Series]]] = {}
        for run in logged:
            for task in task_names(run):
                found = [(row["inner_steps"], row["tasks"].get(task, {}).get(quantity)) for row in run.metrics]
                _add(panels.setdefault(task, {}), run.label, found)
            if len(task_names(run)) > 1:
                _add(panels.setdefault(MEAN, {}), run.label, _mean_of_tasks(run, quantity))
        panels = {task: by_label for task, by_label in panels.items() if by_label}
        if panels:
            figure = figures.training_figure(panels, styles, ylabel=ylabel)
            page.figure(figures.save(figure, f"training_{quantity}", folder), f"{caption}. {note}")
            training_csv(folder / f"training_{quantity}.csv", panels, quantity)
            about = f"{caption}: means over seeds in ten parts, named by the inner steps at their middle."
            training_markdown(folder / f"training_{quantity}.md", panels, about)
    errors: dict[str, list[figures.Series]] = {}
    for run in logged:
        readings = [reading for row in run.metrics for reading in row.get("approximation_errors", ())]
        _add(errors, run.label, [(r["step"], r["error"] / r["distance"] if r["distance"] else None) for r in readings])
    if errors:
        figure = figures.training_figure({"one task in turn": errors}, styles, ylabel="relative error")
        caption = (
            "Approximation error of the trajectories (equation 5) relative to ||theta - phi||, measured by running "
            "one task again from phi; the task changes from round to round."
        )
        page.figure(figures.save(figure, "approximation_error", folder), f"{caption} {note}")
    norms: dict[str, list[figures.Series]] = {}
    for run in logged:
        # Zero means that phi has not moved yet.
        _add(norms, run.label, [(row["inner_steps"], row.get("meta_update_norm") or None) for row in run.metrics])
    if norms:
        figure = figures.training_figure({"meta-update": norms}, styles, ylabel="norm of the meta-update")
        caption = "Euclidean norm of the last meta-update of phi; where phi moves at every step, each move is small."
        page.figure(figures.save(figure, "meta_update", folder), f"{caption} {note}")


def _mean_of_tasks(run: Run, quantity: str) -> list[tuple[Any, Any]]:
    """The mean over the tasks that logged it, a point for each row."""
    found = []
    for row in run.metrics:
        values = [task[quantity] for task in row["tasks"].values() if task.get(quantity) is not None]
        found.append((row["inner_steps"], sum(values) / len(values) if values else None))
    return found


def _add(into: dict[str, list[figures.Series]], label: str, points: Sequence[tuple[Any, Any]]) -> None:
    kept = [(x, y) for x, y in points if y is not None]
    if kept:
        into.setdefault(label, []).append(([float(x) for x, _ in kept], [float(y) for _, y in kept]))
