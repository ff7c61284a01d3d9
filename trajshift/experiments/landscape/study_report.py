"""Tables, tests and figures of the study, from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from trajshift.evaluation.statistics import PairedTest, show
from trajshift.experiments.landscape.drawing import distribution_figure
from trajshift.experiments.landscape.measure import METHODS, Limit, yardsticks
from trajshift.experiments.landscape.study_settings import Row, StudySettings, key_of, limit_of
from trajshift.experiments.landscape.summary import Comparison, compared, show_corrected_p
from trajshift.report.figures import save
from trajshift.utils.environment import environment
from trajshift.utils.files import replace_file, write_json
from trajshift.utils.processes import Key
from trajshift.utils.table import Table

Rows = Mapping[Key, Row]


def write_report(out: Path, rows: Rows, study: StudySettings) -> None:
    """study.md, study.svg, study.png and study.json beside study.jsonl."""
    settings = study.settings
    scale = np.asarray(yardsticks(range(settings.sets), settings))
    found: dict[Limit, Comparison] = {}
    quality: dict[str, dict[str, np.ndarray]] = {}
    tables: list[str] = []
    for limit in study.limits():
        name = f"{limit.amount:,} {limit.unit}"
        of_method = {method: _rows_of(rows, method, limit, study) for method in METHODS}
        quality[name] = {m: np.array([row["quality"] for row in of], dtype=float) for m, of in of_method.items()}
        found[limit] = compared(quality[name], scale)
        tables += [f"## {name}\n", _table(found[limit], rows, of_method, limit, study).markdown()]
        tables.append(_tests(found[limit]).markdown())
    save(distribution_figure(quality, float(np.median(scale[0]))), "study", out)
    head = _HEAD.format(sets=settings.sets, side=settings.side, study=study, tuned=len(study.tuning_seeds))
    replace_file(out / "study.md", head + "\n".join(tables))
    numbers = {
        f"{limit.amount} {limit.unit}": {m: getattr(one, m) for m in ("mean", "median", "good")}
        for limit, one in found.items()
    }
    about = {"settings": asdict(study), "environment": environment(), "quality": numbers}
    write_json(out / "study.json", about)


_HEAD = """# All starts, {sets} random sets of tasks, meta_lr tuned

Every method starts from each point of a {side} x {side} grid on {sets} random sets of tasks. Its meta_lr is the best of
three a decade on {study.tuning_side} x {study.tuning_side} starts of {tuned} other sets, tuned for each budget: the
lowest mean final quality, overflow counted as the worst point of the domain. Quality is the mean loss of the tasks
after as many Adam steps as the horizon; lower is better, and no start counts as worse than the worst point of the
domain. Means are over sets with 95% t-intervals; tests
are paired over sets, corrected by Holm within a table.

"""


def _rows_of(rows: Rows, method: str, limit: Limit, study: StudySettings) -> list[Row]:
    same = limit_of(method, limit, study.settings)
    return [rows[key_of("final", method, same, seed)] for seed in range(study.settings.sets)]


def _table(
    comparison: Comparison, rows: Rows, of_method: Mapping[str, list[Row]], limit: Limit, study: StudySettings
) -> Table:
    columns = {measure: comparison.estimates(measure) for measure in ("mean", "good")}
    lines = []
    for method, of in of_method.items():
        scores = rows[key_of("tuning", method, limit_of(method, limit, study.settings))]["scores"]
        tried = " ".join(f"**{lr}**" if float(lr) == of[0]["meta_lr"] else lr for lr in scores)
        median = float(np.mean(list(comparison.median[method].values())))
        lines.append([
            method, tried, str(of[0]["updates"]), f"{of[0]['inner_steps']:,}", show(columns["mean"][method]),
            f"{median:.3f}", show(columns["good"][method], 1), str(sum(row["left"] for row in of)),
            str(sum(row["overflowed"] for row in of)),
        ])  # fmt: skip
    caption = (
        f"Bold: the meta_lr chosen of those tried. Good ends: % of starts that end in the best tenth of the domain. "
        f"Left, overflowed: of {comparison.starts:,} starts; in the mean an overflow counts as the worst point of the "
        "domain, in median and good ends as bad."
    )
    header = (
        "method", "meta_lr", "meta-updates", "inner steps", "mean quality", "median", "good ends", "left", "overflowed",
    )  # fmt: skip
    return Table(header, lines, caption)


def _tests(comparison: Comparison) -> Table:
    mean, good = comparison.tests("mean"), comparison.tests("good")
    lines = [[f"{a} - {b}", *_cells(mean[a, b], 3), *_cells(good[a, b], 1)] for a, b in mean]
    header = ("pair", "mean quality", "p", "good ends, points", "p")
    return Table(header, lines, "Differences, lower quality and more good ends are better.")


def _cells(test: PairedTest, digits: int) -> tuple[str, str]:
    return show(test.difference, digits, signed=True), show_corrected_p(test)
