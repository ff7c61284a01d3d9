"""`trajshift experiment approximation-error`: measures what is missing, then draws and writes from the saved units."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.errors import UsageError
from trajshift.experiments.approximation.measurement_plan import (
    MeasurementPlan,
    Setting,
    chosen_recipe,
    key_of,
    networks,
    used_fields,
)
from trajshift.experiments.saved_rows import saved_rows
from trajshift.recipes.recipe import Recipe, validate
from trajshift.utils.environment import environment
from trajshift.utils.files import append_row, disk_errors, write_json
from trajshift.utils.imports import need_report_extra
from trajshift.utils.processes import Jobs, cores, run_in_processes
from trajshift.utils.progress import Progress
from trajshift.utils.terminal import console

if TYPE_CHECKING:
    from trajshift.experiments.approximation.measure import Laboratory

UNITS, SETTINGS = "units.jsonl", "settings.json"


def run_experiment(
    out: Path, recipe: str | None = None, overrides: Sequence[str] = (), *, plan: MeasurementPlan | None = None
) -> None:
    """Measure every setting of the plan that is not yet in `out`, then write figures, findings and the page.

    Raises:
        UsageError: `out` contains results of other settings, the recipe does not fit, or a worker died.
    """
    need_report_extra()
    plan = plan or MeasurementPlan()
    loaded = chosen_recipe(recipe, overrides)
    names = list(networks(loaded))
    with disk_errors(out, option="--out", again="the same command"):
        out.mkdir(parents=True, exist_ok=True)
        units = saved_rows(out / UNITS)
        _claim(out, loaded, plan, begun=bool(units))
        work = [(setting, draw) for draw in range(plan.draws) for setting in plan.settings(names)]
        missing = [(setting, draw) for setting, draw in work if key_of(setting, draw) not in units]
        units |= _measure(out, loaded, plan, missing, len(work))

        from trajshift.experiments.approximation.presentation import write_results

        page = write_results(out, units, plan, loaded, names)
    console().print(f"figures, findings.md and results.json are in {out}, the page is {page}", soft_wrap=True)


def _claim(out: Path, recipe: Recipe, plan: MeasurementPlan, *, begun: bool) -> None:
    """Records the settings in the folder, or rejects a folder that was started with others."""
    said = json.loads(json.dumps({"plan": asdict(plan), "recipe": used_fields(recipe)}))
    if begun and _settings(out / SETTINGS) != said:
        raise UsageError(f"{out} contains an experiment with other settings; name another folder with --out")
    write_json(out / SETTINGS, said)


def _settings(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}); put it back, or name another folder with --out") from None


def _measure(
    out: Path, recipe: Recipe, plan: MeasurementPlan, missing: Sequence[tuple[Setting, int]], total: int
) -> dict[str, dict[str, Any]]:
    """Measures in one process per core; every unit is saved as soon as it is done."""
    text, commit = json.dumps(asdict(recipe)), environment()["commit"]
    jobs: Jobs = {(setting, draw): partial(_measure_one, text, plan, setting, draw) for setting, draw in missing}
    done, units = total - len(missing), {}
    with Progress("approximation error", total, start=done) as progress:
        for (setting, draw), unit in run_in_processes(jobs, max(1, min(cores(), len(missing)))):
            key = key_of(setting, draw)
            units[key] = {"key": key, **asdict(setting), "draw": draw, "commit": commit, **unit}
            append_row(out / UNITS, units[key])
            done += 1
            progress.update(done, note=f"{setting.optimizer}, {setting.network}, draw {draw}")
    return units


def _measure_one(recipe: str, plan: MeasurementPlan, setting: Setting, draw: int) -> dict[str, Any]:
    return _laboratory(recipe, plan).measure(setting, draw)


@cache
def _laboratory(recipe: str, plan: MeasurementPlan) -> Laboratory:
    """Kept by each process: tasks are loaded once."""
    from trajshift.experiments.approximation.measure import Laboratory

    return Laboratory(validate(json.loads(recipe)), plan)
