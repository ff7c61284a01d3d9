"""`trajshift experiment approximation-error`: measures what is missing, then draws and writes from the saved units."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.commands import need_report_extra
from trajshift.errors import UsageError
from trajshift.experiments.approximation.plan import Plan, Setting, chosen_recipe, key_of, networks
from trajshift.pool import cores, stop_on_signal
from trajshift.progress import Progress
from trajshift.recipe import Recipe, flatten
from trajshift.rows import append_row, read_jsonl
from trajshift.rundir import disk_errors, environment
from trajshift.tables import console

if TYPE_CHECKING:
    from trajshift.experiments.approximation.measure import Laboratory

UNITS, SETTINGS = "units.jsonl", "settings.json"


def run_experiment(
    out: Path, recipe: str | None = None, overrides: Sequence[str] = (), *, plan: Plan | None = None
) -> None:
    """Measure every setting of the plan that `out` does not hold yet, then write figures, findings and the page.

    Raises:
        UsageError: `out` holds results of other settings, the recipe does not fit, or a worker died.
    """
    need_report_extra()
    plan = plan or Plan()
    loaded = chosen_recipe(recipe, overrides)
    names = list(networks(loaded))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, loaded, plan)
        work = [(setting, draw) for draw in range(plan.draws) for setting in plan.settings(names)]
        units = {row["key"]: row for row in read_jsonl(out / UNITS)}
        missing = [(setting, draw) for setting, draw in work if key_of(setting, draw) not in units]
        _measure(out, loaded, plan, missing, len(work))
        units = {row["key"]: row for row in read_jsonl(out / UNITS)}

        from trajshift.experiments.approximation.presentation import write_results

        page = write_results(out, units, plan, loaded, names)
    console().print(f"figures, findings.md and results.json are in {out}, the page is {page}", soft_wrap=True)


def _claim(out: Path, recipe: Recipe, plan: Plan) -> None:
    """Writes what the folder is for, or refuses one that is for something else."""
    ignored = ("output.", "targets", "tuning", "finetune.", "inner.", "rounds", "horizon", "method", "meta", "seed")
    fields = {name: value for name, value in flatten(recipe).items() if not name.startswith(ignored)}
    said = json.loads(json.dumps({"plan": asdict(plan), "recipe": fields}))
    file = out / SETTINGS
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != said:
        raise UsageError(f"{out} holds an experiment with other settings; name another folder with --out")
    file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _measure(out: Path, recipe: Recipe, plan: Plan, missing: Sequence[tuple[Setting, int]], total: int) -> None:
    """Measures in one process per core; every unit is saved as soon as it is there."""
    if not missing:
        return
    processes = min(cores(), len(missing))
    where = environment()
    with (
        stop_on_signal(),
        Progress("approximation error", total, start=total - len(missing)) as progress,
        ProcessPoolExecutor(processes, get_context("spawn"), _open_laboratory, (recipe, plan)) as pool,
    ):
        running = {pool.submit(_measure_one, setting, draw): (setting, draw) for setting, draw in missing}
        try:
            for done, future in enumerate(as_completed(running), total - len(missing) + 1):
                setting, draw = running[future]
                about = {"key": key_of(setting, draw), **asdict(setting), "draw": draw, "commit": where["commit"]}
                append_row(out / UNITS, about | future.result())
                progress.update(done, note=f"{setting.optimizer}, {setting.network}, draw {draw}")
        except BrokenProcessPool:
            raise UsageError(
                f"a measuring process died; what was measured is in {out}, the same command goes on"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_laboratory: Laboratory


def _open_laboratory(recipe: Recipe, plan: Plan) -> None:
    """Prepares a worker: one thread, and an interrupt is the parent's affair."""
    global _laboratory
    import torch

    from trajshift.experiments.approximation.measure import Laboratory

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _laboratory = Laboratory(recipe, plan)


def _measure_one(setting: Setting, draw: int) -> dict[str, Any]:
    parent = parent_process()
    if parent is not None and not parent.is_alive():  # it was killed, and nobody waits for the rest
        os._exit(1)
    return _laboratory.measure(setting, draw)
