"""`report.html` for one run or many, from saved files only; torch is not needed.

The page holds the comparison with intervals and tests, accuracy against inner steps, few-data curves,
training curves, cost, recipe and environment; a part whose files are missing says how to get them. Every
figure is also saved beside the page as SVG and PNG, the results' tables as CSV and Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import FINAL, Row
from trajshift.recipes.recipe import Recipe, load, to_yaml
from trajshift.report import figures, result_sections
from trajshift.report.page import Page
from trajshift.report.tables import training_csv, training_markdown
from trajshift.runs.evaluation_rows import collect, distinct, labels_of, read_jsonl


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run directory holds."""

    path: Path
    label: str
    recipe: Recipe
    metrics: list[Row]
    timing: list[Row]
    environment: dict[str, Any]
    choices: dict[str, Any]
    """What the recipe left open and the trainer resolved."""

    @property
    def last(self) -> Row:
        """The last row of metrics; empty for a run that logged nothing."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def seconds(self) -> float | None:
        """Wall time of training, where it was written."""
        return float(self.timing[-1]["seconds"]) if self.timing and "seconds" in self.timing[-1] else None


def write_report(
    paths: Sequence[Path | str],
    out: Path | str | None = None,
    *,
    train_images: Sequence[int | None] | None = None,
    as_asked: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page for these run directories and returns its path.

    `out` is the HTML file or a folder for it; None is `report.html` in the run, or in the folder above the first of
    several. `train_images` and `as_asked` limit the results as they do for `collect`; `notes` are further sentences
    for the reader. Figures go to a folder of the page's name beside it. The same files give the
    same page, byte for byte.

    Raises:
        UsageError: no run given, or a path that is no run directory.
    """
    runs = load_runs([Path(path) for path in paths])
    rows, left_out = collect([run.path for run in runs], train_images=train_images, as_asked=as_asked)
    target = _page_path(runs, out)
    folder = target.parent / f"{target.stem}-figures"
    styles = figures.looks(list(dict.fromkeys(run.label for run in runs)))
    page = Page(_title(runs))
    page.paragraph(_subtitle(runs), "quiet")
    final = result_sections.comparison(page, rows, styles, folder)
    for note in (*notes, *left_out, *_unfinished(runs, rows)):
        page.paragraph(note, "note")
    if final:
        rows = result_sections.like(rows, final)
        result_sections.against_steps(page, rows, final, styles, folder)
        result_sections.against_horizon(page, rows, final, {run.label: run.recipe.horizon for run in runs}, folder)
        result_sections.few_data(page, rows, final, styles, folder)
    _training(page, runs, styles, folder)
    _cost(page, runs)
    _recipes(page, runs)
    _environment(page, runs)
    _explanation(page)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.html(), encoding="utf-8")
    return target


def _unfinished(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    """A sentence for each run that does not count; figures show it as far as it is."""
    evaluated = {(row["label"], row["seed"]) for row in rows if row["checkpoint"] == FINAL}
    found = []
    for run in runs:
        done, total = run.last.get("step", 0), run.recipe.total_steps
        if (run.label, run.recipe.seed) in evaluated:
            continue
        if done < total:
            found.append(f"{run.path.name} is not finished: {done:,} of {total:,} inner steps; its figures end there.")
        elif evaluated:
            found.append(f"{run.path.name} is not in the tables: trajshift evaluate fine-tunes its targets.")
    return found


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads the run directories; every file but the recipe may be missing."""
    recipes = {path: load(path) for path in distinct(paths)}
    labels = labels_of(recipes)
    return [
        Run(
            path=path,
            label=labels[path],
            recipe=recipe,
            metrics=read_jsonl(path / "metrics.jsonl", {"step": int, "inner_steps": int, "tasks": dict}),
            timing=read_jsonl(path / "timing.jsonl"),
            environment=_read_json(path / "environment.json"),
            choices=_read_json(path / "choices.json"),
        )
        for path, recipe in recipes.items()
    ]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); delete it to go without") from None
    return content if isinstance(content, dict) else {}


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
    seeds = sorted({run.recipe.seed for run in runs})
    tasks = list(dict.fromkeys(name for run in runs for name in _task_names(run)))
    return (
        f"{_count(len(runs), 'run')} with {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), "
        f"meta-trained on {_count(len(tasks), 'task')}: {', '.join(tasks)}."
    )


def _task_names(run: Run) -> list[str]:
    return list(run.last.get("tasks") or run.recipe.source_tasks())


# -- training
# --------------------------------------------------------------------------------------------------

MEAN = "mean of tasks"
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
            if len(_task_names(run)) > 1:
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


def _cost(page: Page, runs: Sequence[Run]) -> None:
    page.heading("What it cost")
    rows = []
    for label, group in _by_label(runs).items():
        seconds = [run.seconds for run in group if run.seconds is not None]
        rows.append(
            [
                label,
                str(len(group)),
                *(_range([run.choices.get(name) for run in group]) for name in ("meta_lr", "meta_every")),
                *(_range([run.last.get(name) for run in group]) for name in ("inner_steps", "gradient_evaluations")),
                _duration(sum(seconds) / len(seconds)) if seconds else "-",
            ]
        )
    page.table(
        ["method", "runs", "meta lr", "meta every", "inner steps", "gradient evaluations", "wall time per run"],
        rows,
        "Inner steps are cumulative per task, replays included; gradient evaluations are summed over all tasks "
        "(held-out passes count 1, Hessian-vector products 2). Wall time is the mean of meta-training, without "
        "fine-tuning.",
    )


def _recipes(page: Page, runs: Sequence[Run]) -> None:
    page.heading("Recipes")
    page.paragraph("A recipe is complete: trajshift train on the file repeats the run. The first run of each method:")
    for label, group in _by_label(runs).items():
        first, others = group[0], [f"{run.path.name} (seed {run.recipe.seed})" for run in group[1:]]
        also = f"; likewise {', '.join(others)}" if others else ""
        page.code(to_yaml(first.recipe), f"{label}: {first.path.name}/recipe.yaml (seed {first.recipe.seed}){also}")


def _environment(page: Page, runs: Sequence[Run]) -> None:
    page.heading("Environment")
    texts: dict[str, list[str]] = {}
    for run in runs:
        if run.environment:
            shown = {key: value for key, value in run.environment.items() if key != "earlier_starts"}
            shown["starts"] = 1 + len(run.environment.get("earlier_starts", []))
            texts.setdefault(json.dumps(shown), []).append(run.path.name)
    if not texts:
        page.paragraph("No environment.json was saved with these runs.")
    for text, names in texts.items():
        rows = [[key.replace("_", " "), _flat(value)] for key, value in json.loads(text).items() if value is not None]
        which = names[0] if len(names) == 1 else "all runs" if len(names) == len(runs) else ", ".join(names)
        page.table(["", which], rows, text=(1,))


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


def _by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _range(values: Sequence[Any]) -> str:
    """One number where all runs agree, else the smallest and the largest."""
    known = [value for value in values if isinstance(value, (int, float))]
    if not known:
        return "-"
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


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
