"""What a run costs as it grows: time of a task's step and memory with T, K and P, and what a second rank gives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from benchmarks.figure import Dot, Dots
from benchmarks.flat import flat_table, measure_flat
from benchmarks.harness import CORES, Process, interleave, once, ratio, spread, threads
from benchmarks.report import Claim, Report, show, show_time
from benchmarks.workload import TINY, Workload, build_trainer, own_bytes
from trajshift.utils.table import Table

OURS = "benchmarks.sides.ours:steps"
ALONE = "benchmarks.sides.ours:alone"
LIMIT = 5.0
"""Percent that a task's step may take longer, and peak memory be higher, than at the reference T or the smallest K."""
LIMIT_RANKS = 1.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    tasks: tuple[int, ...]
    """T; the time is compared with that of `reference_tasks`."""
    reference_tasks: int
    of_tasks: Workload
    horizons: tuple[int, ...]
    of_horizons: Workload
    block: int
    """Inner steps in a block, for every K."""
    widths: tuple[int, ...]
    """Of ResNet20, for P."""
    flat_block: float
    ranks: int
    of_ranks: Workload
    rounds: int


FULL = Plan(
    tasks=(1, 8, 32, 128),
    reference_tasks=8,
    of_tasks=Workload(batch_size=32, size=16),
    horizons=(10, 100, 1000, 10_000),
    of_horizons=Workload(tasks=2, model="conv", width=16, batch_size=32, size=8, images=512),
    block=500,
    widths=(16, 32, 64, 128),
    flat_block=2e9,
    ranks=2,
    of_ranks=Workload(),
    rounds=20,
)
TOY = Plan(
    tasks=(2, 4),
    reference_tasks=2,
    of_tasks=TINY,
    horizons=(2, 8),
    of_horizons=TINY,
    block=4,
    widths=(4, 8),
    flat_block=1e5,
    ranks=2,
    of_ranks=TINY,
    rounds=2,
)


def measure(*, toy: bool) -> Report:
    """All parts."""
    plan = TOY if toy else FULL
    report = Report(title="Scaling (CPU)")
    dots = [*_tasks(plan, report), *_horizons(plan, report)]
    report.panels.append(Dots("A task's step as a run grows (CPU)", "extra time, %", dots))
    with threads(1):
        workload = replace(plan.of_tasks, model="resnet20", batch_size=2, images=8)
        cases = [(f"ResNet20, width {width}", replace(workload, width=width)) for width in plan.widths]
        flat = measure_flat(cases, device=torch.device("cpu"), block=plan.flat_block, rounds=plan.rounds)
    report.tables.append(flat_table(flat, "One thread, float32."))
    if plan.ranks <= CORES:
        _ranks(plan, report)
    return report


# -- tasks -----------------------------------------------------------------------------------------------------------


def _tasks(plan: Plan, report: Report) -> list[Dot]:
    """As many task-steps in a block for every T."""
    most = max(plan.tasks)
    workloads = {str(count): replace(plan.of_tasks, tasks=count) for count in plan.tasks}
    steps = {str(count): max(1, most // count) for count in plan.tasks}
    seconds, peaks = _run(workloads, steps, plan.rounds, "scaling, T")
    each = {name: [one / int(name) for one in values] for name, values in seconds.items()}
    reference = str(plan.reference_tasks)
    rows, dots = [], []
    for name in workloads:
        extra = ratio(each[name], each[reference]).above_one()
        rows.append([name, show_time(spread(each[name])), show(extra, " %"), f"{peaks[name] / 1e6:,.1f} MB"])
        if int(name) > plan.reference_tasks:
            text = f"a task's step takes longer, T = {name} against {reference}"
            report.claims.append(Claim(text, extra, LIMIT, " %"))
            dots.append(Dot(f"T = {name} against {reference}", extra.median, extra.low, extra.high, LIMIT))
    own = _own_bytes(plan.of_tasks)
    further = (peaks[str(most)] - peaks[reference]) / (most - plan.reference_tasks)
    report.claims.append(Claim("memory of a further task", once(further / 1e6), round(own / 1e6, 2), " MB"))
    report.tables.append(
        Table(["T", "a task's step", f"longer than at T = {reference}", "peak memory"], rows, _say(plan, own))
    )
    report.samples["tasks"] = {"seconds": seconds, "bytes": peaks}
    return dots


def _say(plan: Plan, own: int) -> str:
    work = plan.of_tasks
    return (
        f"{work.model}, batch {work.batch_size}, {work.size}x{work.size}, one thread, engine auto, tasks on the same "
        "images. Peak of resident memory above that before the trainer was built. Row, gradient, optimizer state and "
        f"head of a task are {own / 1e6:.2f} MB, the limit of what a further one may cost."
    )


def _own_bytes(workload: Workload) -> int:
    trainer = build_trainer(replace(workload, tasks=1), engine="loop")
    trainer.advance()
    return own_bytes(trainer)


# -- horizon ---------------------------------------------------------------------------------------------------------


def _horizons(plan: Plan, report: Report) -> list[Dot]:
    """Every run takes as many inner steps, at the full size as many as the longest K."""
    workloads = {f"{horizon:,}": replace(plan.of_horizons, horizon=horizon) for horizon in plan.horizons}
    seconds, peaks = _run(workloads, dict.fromkeys(workloads, plan.block), plan.rounds, "scaling, K")
    first, *others = workloads
    rows, dots = [], []
    for name in workloads:
        extra = ratio(seconds[name], seconds[first]).above_one()
        rows.append([name, show_time(spread(seconds[name])), show(extra, " %"), f"{peaks[name] / 1e6:,.1f} MB"])
        if name != first:
            report.claims.append(Claim(f"a step takes longer, K = {name} against {first}", extra, LIMIT, " %"))
            dots.append(Dot(f"K = {name} against {first}", extra.median, extra.low, extra.high, LIMIT))
    growth = once(peaks[others[-1]] / peaks[first]).above_one()
    report.claims.append(Claim(f"more memory, K = {others[-1]} against {first}", growth, LIMIT, " %"))
    work = plan.of_horizons
    caption = (
        f"{work.tasks} tasks, {work.model}, batch {work.batch_size}, {work.size}x{work.size}, one thread, engine auto; "
        f"{plan.block * plan.rounds:,} inner steps of each run are counted."
    )
    report.tables.append(Table(["K", "a step", f"longer than at K = {first}", "peak memory"], rows, caption))
    report.samples["horizons"] = {"seconds": seconds, "bytes": peaks}
    return dots


# -- ranks -----------------------------------------------------------------------------------------------------------


def _ranks(plan: Plan, report: Report) -> None:
    ranks, work = plan.ranks, plan.of_ranks
    options = {"engine": "auto", **work.options()}
    share = {**options, "tasks": work.tasks // ranks}
    sides = {
        "1 rank": Process(OURS, options),
        f"{ranks} ranks": Process(OURS, options, ranks=ranks),
        f"{ranks} processes apart": Process(ALONE, share, ranks=ranks),
    }
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        seconds = interleave(sides, steps=1, rounds=plan.rounds, warmup=2, title="scaling, ranks")
    gain = ratio(seconds["1 rank"], seconds[f"{ranks} ranks"])
    text = f"times as fast with {ranks} ranks on {ranks} cores as with one on one"
    report.claims.append(Claim(text, gain, LIMIT_RANKS, at_least=True))
    rows = [
        [name, show_time(spread(values)), show(ratio(seconds["1 rank"], values))] for name, values in seconds.items()
    ]
    caption = (
        f"{work.tasks} tasks, {work.model}, batch {work.batch_size}, {work.size}x{work.size}; torchrun with gloo, one "
        f"thread a rank. The processes apart train {share['tasks']} tasks each and exchange nothing: what the cores, "
        "which share a memory, can give at most."
    )
    report.tables.append(Table(["ranks", "a step", "times as fast"], rows, caption))
    report.samples["ranks"] = seconds


def _run(
    workloads: Mapping[str, Workload], steps: Mapping[str, int], rounds: int, title: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per step and bytes of memory above the start of every workload, each in a process with one thread."""
    sides = {name: Process(OURS, {"engine": "auto", **work.options()}) for name, work in workloads.items()}
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        seconds = interleave(sides, steps=steps, rounds=rounds, title=title)
    return seconds, {name: side.peak_bytes - side.start_bytes for name, side in sides.items()}
