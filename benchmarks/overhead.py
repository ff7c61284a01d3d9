"""The method is free: T learners under trajectory shifting against the same T learners trained plainly.

Also the flat mean, update and shift against a plain copy, and what a run spends on logging, metrics and progress.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.figure import Dot, Dots
from benchmarks.flat import flat_claims, flat_table, measure_flat
from benchmarks.harness import interleave, once, ratio, spread, threads, timed
from benchmarks.report import Claim, Report, show, show_time
from benchmarks.sides.ours import advance
from benchmarks.sides.plain import Plain
from benchmarks.workload import TINY, Workload, build_trainer, random_images
from trajshift import MetaTrainer
from trajshift.recipes.recipe import load
from trajshift.runs.train import train
from trajshift.utils.table import Table

LIMIT_LOGGING = 1.0
"""Percent of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size of the comparison with plain training."""

    label: str
    workload: Workload
    limit: float
    """Percent."""
    steps: int
    """In a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    cases: tuple[Case, ...]
    flat: tuple[tuple[str, Workload], ...]
    block: float
    """Bytes that a block of flat updates moves."""
    rounds: int
    logged: Workload
    logged_steps: int


FULL = Plan(
    cases=(
        Case(label="batch 128, 32x32", workload=Workload(), limit=3.0, steps=1),
        Case(label="batch 32, 16x16", workload=Workload(batch_size=32, size=16), limit=10.0, steps=5),
    ),
    flat=(
        ("ResNet20", Workload(batch_size=2, size=16, images=8)),
        ("ResNet18", Workload(model="resnet18", batch_size=2, images=8)),
    ),
    block=2e9,
    rounds=30,
    logged=Workload(batch_size=32, size=16, images=256),
    logged_steps=200,
)
TOY = Plan(
    cases=(Case(label="toy", workload=TINY, limit=3.0, steps=2),),
    flat=(("toy", TINY),),
    block=1e5,
    rounds=3,
    logged=TINY,
    logged_steps=12,
)


def measure(*, toy: bool) -> Report:
    """All parts, with one thread."""
    plan = TOY if toy else FULL
    report = Report(title="Overhead over plain training")
    with threads(1):
        _compare(plan, report)
        _flat(plan, report)
        _logging(plan, report)
    return report


def _compare(plan: Plan, report: Report) -> None:
    rows, dots = [], []
    for case in plan.cases:
        trainer = build_trainer(case.workload, engine="auto")
        trainer.advance()  # the learners take their rows
        sides = {"shifting": timed(advance(trainer)), "plain": timed(Plain(trainer).take)}
        seconds = interleave(sides, steps=case.steps, rounds=plan.rounds, title=f"overhead, {case.label}")
        extra = ratio(seconds["shifting"], seconds["plain"]).above_one()
        report.claims.append(Claim(f"a step takes longer, {case.label}", extra, case.limit, " %"))
        dots.append(Dot(case.label, extra.median, extra.low, extra.high, case.limit))
        both = [show_time(spread(seconds[side])) for side in sides]
        rows.append([case.label, str(case.workload.tasks), case.workload.model, *both, show(extra, " %")])
        report.samples[case.label] = seconds
    report.panels.append(Dots("Trajectory shifting over plain training (CPU)", "extra time of a step, %", dots))
    caption = (
        "Seconds for one inner step of all T learners, phi moved and theta shifted after each; plain: the same models, "
        "batches and fused SGD in ordinary PyTorch, nothing else. One process, one thread, float32, engine auto, which "
        "then is the loop; it lets the process keep freed memory, for both sides."
    )
    report.tables.append(Table(["case", "T", "model", "shifting", "plain", "extra"], rows, caption))


def _flat(plan: Plan, report: Report) -> None:
    found = measure_flat(plan.flat, device=torch.device("cpu"), block=plan.block, rounds=plan.rounds)
    report.tables.append(flat_table(found, "One thread, float32."))
    report.claims += flat_claims(found)


def _logging(plan: Plan, report: Report) -> None:
    steps, between = logged_run(plan.logged, plan.logged_steps)
    share = 100 * sum(between) / sum(steps)
    work = plan.logged
    text = f"logging, metrics and progress, batch {work.batch_size}, {work.size}x{work.size}"
    report.claims.append(Claim(text, once(share), LIMIT_LOGGING, " %"))
    caption = (
        "All that `trajshift train` does between the steps of a run with the default output settings: metrics, rows, "
        "TensorBoard, progress, looking for signals. Mean of a step; checkpoints are not counted. One thread."
    )
    means = [show_time(once(sum(one) / len(one))) for one in (steps, between)]
    row = [f"{len(steps)} steps", *means, f"{share:.3f} %"]
    report.tables.append(Table(["run", "in a step", "between steps", "share"], [row], caption))
    report.samples["in steps"], report.samples["between steps"] = steps, between


def logged_run(workload: Workload, count: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps of a real run, and of the time between them."""
    stamps: list[tuple[float, float]] = []
    advance_untimed = MetaTrainer.advance

    def advance_timed(trainer: MetaTrainer) -> Any:
        began = time.perf_counter()
        event = advance_untimed(trainer)
        stamps.append((began, time.perf_counter()))
        return event

    with tempfile.TemporaryDirectory() as folder, patch.object(MetaTrainer, "advance", advance_timed):
        recipe = load(_recipe(Path(folder), workload), [f"horizon={count}", "output.checkpoint_every=null"])
        train(recipe, Path(folder) / "run")
    return [end - began for began, end in stamps], _gaps(stamps)


def _gaps(stamps: Sequence[tuple[float, float]]) -> list[float]:
    return [after[0] - before[1] for before, after in pairwise(stamps)]


def _recipe(folder: Path, workload: Workload) -> Path:
    """The workload as a recipe, its images in a file."""
    images, labels = random_images(workload.images, workload.size, workload.classes)
    x, y = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    width = "" if workload.width is None else f", options: {{width: {workload.width}}}"
    lines = [
        "rounds: 1",
        "threads: 1",
        f"batch_size: {workload.batch_size}",
        f"model: {{name: {workload.model}{width}}}",
        f"data: {{root: {folder}, crop_padding: 4, flip: true}}",
        "tasks:",
        *(f"  task{t}: {{source: 'npz:images.npz'}}" for t in range(workload.tasks)),
    ]
    path = folder / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
