"""`report.html` for one run or many, from saved files only; torch is not needed.

The page has the comparison with intervals and tests, accuracy against inner steps, few-data curves,
training curves, cost, recipe and environment; a part whose files are missing says how to get them. Every
figure is also saved beside the page as SVG and PNG, the results' tables as CSV and Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trajshift.evaluation.evaluation_row import FINAL, EvaluationRow
from trajshift.report import figures, result_sections
from trajshift.report.page import Page
from trajshift.report.run_sections import cost_section, environment_section, explanation_section, recipes_section
from trajshift.report.saved_runs import Run, load_runs, task_names
from trajshift.report.training_sections import training_section
from trajshift.runs.collect_rows import collect
from trajshift.utils.files import replace_file
from trajshift.utils.imports import need_report_extra


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
        UsageError: no run given, a path that is not a run directory, or the report extra is not installed.
    """
    need_report_extra()
    runs = load_runs([Path(path) for path in paths])
    rows, left_out = collect([run.path for run in runs], train_images=train_images, as_asked=as_asked)
    target = _page_path(runs, out)
    folder = target.parent / f"{target.stem}-figures"
    before = _figures_and_tables(folder)
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
    training_section(page, runs, styles, folder)
    cost_section(page, runs)
    recipes_section(page, runs)
    environment_section(page, runs)
    explanation_section(page)
    replace_file(target, page.html())
    _drop_old(before)
    return target


_MADE = re.compile(
    r"(comparison|tests|inner_steps|reach|horizon|few_data|gain|training|approximation_error|meta_update)"
    r"[\w.-]*\.(svg|png|csv|md)"
)
"""Names of figures and tables that a page may have."""


def _figures_and_tables(folder: Path) -> dict[Path, int]:
    """The figures and tables of a page that are there, and which files they are."""
    there = folder.iterdir() if folder.is_dir() else ()
    return {file: file.stat().st_ino for file in there if _MADE.fullmatch(file.name) and file.is_file()}


def _drop_old(before: Mapping[Path, int]) -> None:
    """Deletes what an earlier page had and this one has not written again."""
    for file, number in before.items():
        if file.exists() and file.stat().st_ino == number:
            file.unlink()


def _unfinished(runs: Sequence[Run], rows: Sequence[EvaluationRow]) -> list[str]:
    """A sentence for each run that does not count; figures show it as far as it is."""
    evaluated = {(row.label, row.seed) for row in rows if row.start == FINAL}
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
    tasks = list(dict.fromkeys(name for run in runs for name in task_names(run)))
    return (
        f"{_count(len(runs), 'run')} with {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), "
        f"meta-trained on {_count(len(tasks), 'task')}: {', '.join(tasks)}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
