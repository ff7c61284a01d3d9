"""Against a fair naive twin on the CPU: one thread for each of its processes, no more of them than cores."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.figure import Dot, Dots
from benchmarks.harness import CORES, Process, interleave, ratio, spread
from benchmarks.report import Claim, Report, show, show_time
from benchmarks.workload import TINY, Workload
from trajshift.utils.table import Table

NAIVE, OURS = "benchmarks.sides.naive:steps", "benchmarks.sides.ours:steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    workload: Workload
    cores: tuple[int, ...]
    """Cores that both sides have."""
    rounds: int
    warmup: int
    """More than the steps on which the engine tries its ways."""
    default_rounds: int
    """Of the twin with PyTorch's own number of threads, which can be very slow; 0 leaves it out."""


FULL = Plan(workload=Workload(), cores=tuple(sorted({1, CORES})), rounds=10, warmup=9, default_rounds=3)
TOY = Plan(
    workload=TINY,
    cores=(min(2, CORES),),
    rounds=2,
    warmup=1,
    default_rounds=0,
)
LIMITS = {"float32": 1.3, "bfloat16": 2.0}


def measure(*, toy: bool) -> Report:
    """Every number of cores in both dtypes; then the twin with default threads, by itself."""
    plan = TOY if toy else FULL
    report = Report(title="Against the naive twin (CPU)")
    rows: list[list[str]] = []
    dots: list[Dot] = []
    for cores in plan.cores:
        seconds = _measured(plan, cores)
        for pair in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
            _tell(report, rows, dots, seconds, cores, *pair)
        report.samples[f"{cores} cores"] = seconds
    if plan.default_rounds:
        slow = _default_threads(plan, cores)
        rows.append([str(cores), "-", "float32, default threads", "-", show_time(spread(slow)), "(not our ratio)"])
        report.samples["default threads"] = slow
    report.panels.append(Dots("Against the naive twin (CPU)", "times as fast", dots))
    work = plan.workload
    caption = (
        f"Seconds for one inner step of {work.tasks} tasks with meta-update and shift, {work.model}, batch "
        f"{work.batch_size}, {work.size}x{work.size}. The twin has a process of one thread on each core, the images in "
        "a DataLoader without workers (a worker would need a core), sums its meta-updates by gloo; ours is one "
        "process of as many threads, engine auto. With default threads each process of the twin has as many threads as "
        "the machine has cores."
    )
    report.tables.append(Table(["cores", "ours", "twin", "ours, a step", "twin, a step", "ratio"], rows, caption))
    return report


def _default_threads(plan: Plan, cores: int) -> list[float]:
    """Seconds per step of the twin by itself, each of its processes with as many threads as there are cores."""
    with Process(NAIVE, plan.workload.options(), threads=CORES, ranks=cores) as side:
        title = "naive twin, default threads"
        return interleave({"naive": side}, steps=1, rounds=plan.default_rounds, title=title)["naive"]


def _measured(plan: Plan, cores: int) -> dict[str, list[float]]:
    """Seconds per step of all sides, which take turns."""
    sides: dict[str, Process] = {}
    for dtype in LIMITS:
        options: dict[str, Any] = replace(plan.workload, bfloat16=dtype == "bfloat16").options()
        sides[f"ours, {dtype}"] = Process(OURS, {"engine": "auto", **options}, threads=cores)
        sides[f"naive, {dtype}"] = Process(NAIVE, options, ranks=cores)
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        title = f"naive twin, {cores} cores"
        return interleave(sides, steps=1, rounds=plan.rounds, warmup=plan.warmup, title=title)


def _tell(
    report: Report,
    rows: list[list[str]],
    dots: list[Dot],
    seconds: dict[str, list[float]],
    cores: int,
    ours: str,
    theirs: str,
) -> None:
    """A row, and where the twin is in float32, as such code is, a claim and a dot."""
    mine, other = seconds[f"ours, {ours}"], seconds[f"naive, {theirs}"]
    faster = ratio(other, mine)
    rows.append([str(cores), ours, theirs, show_time(spread(mine)), show_time(spread(other)), show(faster)])
    if theirs == "float32":
        label = f"{ours}, {cores} core{'s' if cores > 1 else ''}"
        report.claims.append(Claim(f"times as fast as the naive twin, {label}", faster, LIMITS[ours], at_least=True))
        dots.append(Dot(label, faster.median, faster.low, faster.high, LIMITS[ours]))
