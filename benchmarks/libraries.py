"""Against `higher` and `torchopt`: time of an inner step and peak memory as K grows.

Their first-order modes do the same as trajshift; unrolled, they do what it avoids.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

from benchmarks.figure import Lines
from benchmarks.harness import Process, SideFailed, interleave, ratio, spread
from benchmarks.report import Report, show, show_time
from benchmarks.workload import Workload
from trajshift.utils.table import Table

OURS = "trajshift"
SIDES = {
    OURS: "benchmarks.sides.ours:rounds",
    "higher, first-order": "benchmarks.sides.libraries:higher_first_order",
    "torchopt, first-order": "benchmarks.sides.libraries:torchopt_first_order",
    "higher, unrolled": "benchmarks.sides.libraries:higher_unrolled",
    "torchopt, unrolled": "benchmarks.sides.libraries:torchopt_unrolled",
}
GROWS = 1.5
"""Peak memory at the longest K over that at the shortest, from which on it counts as growing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    workload: Workload
    horizons: tuple[int, ...]
    rounds: int


FULL = Plan(
    workload=Workload(tasks=1, batch_size=8, size=16, images=512),
    horizons=(20, 100, 400),
    rounds=6,
)
TOY = Plan(
    workload=Workload(tasks=1, model="conv", width=4, batch_size=4, size=8, images=16),
    horizons=(2, 4),
    rounds=2,
)


@dataclass(frozen=True, slots=True)
class Found:
    """One side at one K."""

    seconds: list[float]
    """Of an inner step."""
    bytes: int
    """Peak of memory above the start."""


def measure(*, toy: bool) -> Report:
    """Every side at every K, each in a process of its own with one thread."""
    plan = TOY if toy else FULL
    missing = unusable()
    found: dict[str, dict[int, Found]] = {name: {} for name in SIDES}
    failures: dict[tuple[str, int], str] = {}
    for horizon in plan.horizons:
        usable = [name for name in SIDES if library(name) not in missing]
        for name, one in _measured(plan, horizon, usable, failures).items():
            found[name][horizon] = one
    report = Report(title="Against higher and torchopt (CPU)")
    report.tables.append(_table(plan, found, failures, missing))
    report.tables.append(_growth(plan, found))
    lines = {name: [(k, one.bytes / 1e6) for k, one in at.items()] for name, at in found.items() if at}
    report.panels.append(Lines("Memory of a trajectory (CPU)", "K, inner steps", "peak, MB", lines))
    for name, at in found.items():
        report.samples[name] = {str(k): {"seconds": one.seconds, "bytes": one.bytes} for k, one in at.items()}
    return report


def library(side: str) -> str:
    """The library that a side needs."""
    return side.split(",")[0]


def unusable() -> dict[str, str]:
    """Libraries that cannot be imported, and why."""
    reasons = {}
    for name in dict.fromkeys(map(library, SIDES)):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            reasons[name] = f"{error.name} is not installed: pip install '.[benchmarks]'"
        except Exception as error:  # any incompatibility with this PyTorch
            reasons[name] = f"cannot be imported with this PyTorch: {type(error).__name__}: {error}"
    return reasons


def _measured(plan: Plan, horizon: int, names: Sequence[str], failures: dict[tuple[str, int], str]) -> dict[str, Found]:
    """All sides at one K in turn; one whose first round fails is recorded and left out."""
    options = replace(plan.workload, horizon=horizon).options()
    sides = {name: Process(SIDES[name], options) for name in names}
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(sides[name])
        for name in names:
            try:
                sides[name](1)
            except SideFailed as error:
                failures[name, horizon] = str(error)
                del sides[name]
        title = f"libraries, K = {horizon}"
        seconds = interleave(sides, steps=1, rounds=plan.rounds, warmup=0, title=title)
    return {
        name: Found([one / horizon for one in seconds[name]], side.peak_bytes - side.start_bytes)
        for name, side in sides.items()
    }


def _table(
    plan: Plan,
    found: Mapping[str, Mapping[int, Found]],
    failures: Mapping[tuple[str, int], str],
    missing: Mapping[str, str],
) -> Table:
    rows = []
    for name in SIDES:
        if library(name) in missing:
            rows.append([name, "-", missing[library(name)], "-", "-"])
            continue
        for horizon in plan.horizons:
            if (name, horizon) in failures:
                rows.append([name, str(horizon), failures[name, horizon], "-", "-"])
                continue
            one = found[name][horizon]
            slower = ratio(one.seconds, found[OURS][horizon].seconds)
            rows.append(
                [name, str(horizon), show_time(spread(one.seconds)), show(slower), f"{one.bytes / 1e6:,.0f} MB"]
            )
    work = plan.workload
    used = ", ".join(f"{name} {version(name)}" for name in ("higher", "torchopt") if name not in missing)
    caption = (
        f"One task, {work.model}, batch {work.batch_size}, {work.size}x{work.size}, rounds of K steps of SGD with "
        "momentum; ours moves phi at every step, the others at the end. Peak of resident memory above that at the "
        f"start. One thread, a process each. {used}"
    )
    return Table(["side", "K", "an inner step", "times ours", "peak memory"], rows, caption.strip())


def _growth(plan: Plan, found: Mapping[str, Mapping[int, Found]]) -> Table:
    rows = []
    for name, at in found.items():
        if len(at) > 1:
            first, last = min(at), max(at)
            factor = at[last].bytes / at[first].bytes
            verdict = "grows with K" if factor >= GROWS else "flat"
            rows.append([name, f"{first} to {last}", f"{factor:.2f}", verdict])
    caption = f"Peak memory at the longest K over that at the shortest; from {GROWS:g} on it counts as growing."
    return Table(["side", "K", "memory ratio", ""], rows, caption)
