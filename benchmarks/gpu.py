"""Everything about one GPU in about five minutes.

The paper's run and its floors, the captured engine against the eager loop and plain training, the fused kernels by
themselves, the flat update, memory with T, and ResNet18 at 224. A part that fails is reported as such and the others
continue.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.figure import Dot, Dots
from benchmarks.flat import flat_table, measure_flat
from benchmarks.harness import interleave, once, ratio, spread, synchronize, timed
from benchmarks.kernels import TOY_KERNELS, KernelPlan, measure_kernels
from benchmarks.paper import PaperPlan, Shape, measure_paper
from benchmarks.report import Claim, Report, show, show_time
from benchmarks.sides.ours import advance
from benchmarks.sides.plain import Plain
from benchmarks.workload import TINY, Workload, build_trainer, engine_of, own_bytes
from trajshift import MetaTrainer
from trajshift.training.engines.recorder import LANES
from trajshift.utils.progress import duration
from trajshift.utils.table import Table

LIMIT_CAPTURED = 5.0
LIMIT_PLAIN = 4.0
"""Percent."""
LIMIT_SMALL = 5.5
"""Milliseconds of a step of `Plan.small` in bfloat16."""
LIMIT_LARGE = 80.0
"""Gigabytes."""
_FIRST_STEPS = 4
"""Steps after which memory has seen its peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    paper: PaperPlan
    small: Workload
    """Of the engines' comparison, and of memory."""
    kernels: KernelPlan
    block: int
    rounds: int
    warmup: int
    """Blocks in which the engine captures its graphs."""
    flat: tuple[tuple[str, Workload], ...]
    flat_block: float
    memory_tasks: tuple[int, ...]
    large: Workload
    large_steps: int


FULL = Plan(
    paper=PaperPlan(),
    small=Workload(),
    kernels=KernelPlan(),
    block=5,
    rounds=12,
    warmup=4,
    flat=(
        ("ResNet20", Workload(batch_size=2, size=16, images=8)),
        ("ResNet18", Workload(model="resnet18", batch_size=2, images=8)),
    ),
    flat_block=2e10,
    memory_tasks=(1, 8, 64),
    large=Workload(model="resnet18", size=224, batch_size=256, images=512),
    large_steps=10,
)
TOY = Plan(
    paper=PaperPlan(
        shapes=(Shape("grey", 8, 3, 16, channels=1), Shape("coloured", 12, 2, 16)),
        workload=replace(TINY, bfloat16=True),
        block=2,
        rounds=3,
        warmup=1,
        eager_steps=2,
        matrix=64,
        copy=2**16,
    ),
    small=TINY,
    kernels=TOY_KERNELS,
    block=2,
    rounds=2,
    warmup=1,
    flat=(("toy", TINY),),
    flat_block=1e5,
    memory_tasks=(1, 2),
    large=TINY,
    large_steps=2,
)


def measure(*, toy: bool) -> Report | str:
    """All parts, or the sentence that there is no GPU."""
    if not torch.cuda.is_available():
        return "gpu: there is no CUDA device on this machine, so nothing was measured"
    return measure_on(torch.device("cuda"), TOY if toy else FULL)


def measure_on(device: torch.device, plan: Plan) -> Report:
    """All parts on a device (tests use the CPU, which reports no memory)."""
    report = Report(title=f"GPU: {torch.cuda.get_device_name()}" if device.type == "cuda" else "GPU: none")
    parts: dict[str, Callable[[], None]] = {
        "the paper's run": lambda: measure_paper(plan.paper, device, report),
        "engines": lambda: _engines(plan, device, report),
        "kernels": lambda: measure_kernels(plan.kernels, device, report),
        "flat update": lambda: _flat(plan, device, report),
        "memory": lambda: _memory(plan, device, report),
        "ResNet18": lambda: _large(plan, device, report, bfloat16=False),
        "ResNet18 in bfloat16": lambda: _large(plan, device, report, bfloat16=True),
    }
    rows = []
    for name, part in parts.items():
        began, outcome, before = time.perf_counter(), "done", len(report.claims)
        try:
            part()
        except Exception as error:  # out of memory, or a step that cannot be captured: the others count all the same
            outcome = f"failed, {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        rows.append([name, outcome, duration(time.perf_counter() - began)])
        for told in (rows[-1], *(claim.cells() for claim in report.claims[before:])):
            print(
                *told, sep=" | ", flush=True
            )  # so that results so far survive if the machine is taken away before the end
        _release(device)
    caption = "What this benchmark itself took, set-up included; of a part that failed nothing above is complete."
    report.tables.append(Table(["part", "", "wall time"], rows, caption))
    return report


def _engines(plan: Plan, device: torch.device, report: Report) -> None:
    """The fastest engine, the eager loop and plain training in turn, in both formats."""
    rows, dots = [], []
    for name, bfloat16 in (("float32", False), ("bfloat16", True)):
        workload = replace(plan.small, bfloat16=bfloat16)
        fast, eager = (build_trainer(workload, engine=engine, device=device) for engine in ("auto", "loop"))
        eager.advance()  # the learners take their rows
        steps = {"fast": advance(fast), "eager": advance(eager), "plain": Plain(eager).take}
        sides = {side: timed(take, device) for side, take in steps.items()}
        title = f"engines, {name}"
        seconds = interleave(sides, steps=plan.block, rounds=plan.rounds, warmup=plan.warmup, title=title)
        gain = ratio(seconds["eager"], seconds["fast"])
        extra = ratio(seconds["eager"], seconds["plain"]).above_one()
        text = f"engine {engine_of(fast)} against the eager loop, {name}"
        report.claims.append(Claim(text, gain, LIMIT_CAPTURED, " x", at_least=True))
        report.claims.append(Claim(f"eager loop over plain training, {name}", extra, LIMIT_PLAIN, " %"))
        if bfloat16:
            step = spread(seconds["fast"]).times(1e3)
            report.claims.append(
                Claim(f"a step at {plan.small.size}x{plan.small.size}, {name}", step, LIMIT_SMALL, " ms")
            )
        dots.append(Dot(name, gain.median, gain.low, gain.high, LIMIT_CAPTURED))
        times = [show_time(spread(seconds[side])) for side in sides]
        rows.append([name, engine_of(fast), *times, show(gain), show(extra, " %")])
        report.samples[title] = seconds
    report.panels.append(Dots("Captured engine against the eager loop (GPU)", "times as fast", dots))
    work = plan.small
    caption = (
        f"T = {work.tasks}, {work.model}, batch {work.batch_size}, {work.size}x{work.size}; a step moves all learners, "
        "phi and theta. float32 as PyTorch sets it (convolutions may use TF32). Plain: the same learners."
    )
    header = ["format", "engine", "a step", "eager loop", "plain", "times as fast as eager", "eager over plain"]
    report.tables.append(Table(header, rows, caption))


def _flat(plan: Plan, device: torch.device, report: Report) -> None:
    found = measure_flat(plan.flat, device=device, block=plan.flat_block, rounds=plan.rounds)
    report.tables.append(flat_table(found, "float32."))


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan, device: torch.device, report: Report) -> None:
    """Peak with T, for the eager loop and the fastest engine."""
    rows = []
    for engine in ("loop", "auto"):
        peaks: dict[int, int] = {}
        for tasks in plan.memory_tasks:
            trainer, peaks[tasks], reserved = _first_steps(replace(plan.small, tasks=tasks), engine, device)
            name, own = engine_of(trainer), own_bytes(trainer)
            # one learner more may be one lane more, with activations of its own, until all lanes are there
            first = min([count for count in peaks if name != "graph" or count >= LANES] or peaks)
            further = (peaks[tasks] - peaks[first]) / max(tasks - first, 1)
            cells = [peaks[tasks] / 1e6, reserved / 1e6, further / 1e6, own / 1e6]
            rows.append([name, str(tasks), *(f"{cell:,.2f} MB" for cell in cells)])
            report.samples[f"memory, engine {name}, T = {tasks}"] = [peaks[tasks], reserved]
            del trainer
            _release(device)
        text = f"memory of a further task, engine {name}, to T = {tasks}"
        report.claims.append(Claim(text, once(further / 1e6), round(own / 1e6, 2), " MB"))
    work = plan.small
    caption = (
        f"{work.model}, batch {work.batch_size}, {work.size}x{work.size}, float32, tasks on the same images. A further "
        "task: growth of the peak by task since the smallest T that fills the engine's streams; its own: row, "
        "gradient, momentum and head."
    )
    header = ["engine", "T", "peak allocated", "reserved", "a further task", "its own"]
    report.tables.append(Table(header, rows, caption))


def _large(plan: Plan, device: torch.device, report: Report, *, bfloat16: bool) -> None:
    """ResNet18 at 224 on every task."""
    work, name = replace(plan.large, bfloat16=bfloat16), "bfloat16" if bfloat16 else "float32"
    trainer, _, reserved = _first_steps(work, "auto", device)
    sides = {"step": timed(advance(trainer), device)}
    seconds = interleave(sides, steps=1, rounds=plan.large_steps, title=f"{work.model} at {work.size}")["step"]
    text = f"memory of {work.model} at {work.size}, batch {work.batch_size}, T = {work.tasks}, {name}"
    report.claims.append(Claim(text, once(reserved / 1e9), LIMIT_LARGE, " GB"))
    rows = [[engine_of(trainer), show_time(spread(seconds)), f"{reserved / 1e9:.1f} GB"]]
    caption = f"{work.model}, {work.size}x{work.size}, batch {work.batch_size}, T = {work.tasks}, {name}."
    report.tables.append(Table(["engine", "a step", "memory reserved"], rows, caption))
    report.samples[f"large, {name}"] = {"seconds": seconds, "bytes": reserved}


def _first_steps(workload: Workload, engine: str, device: torch.device) -> tuple[MetaTrainer, int, int]:
    """A new trainer after its first steps, the most bytes allocated and reserved meanwhile; 0 on the CPU."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    trainer = build_trainer(workload, engine=engine, device=device)
    advance(trainer)(_FIRST_STEPS)
    synchronize(device)
    if not cuda:
        return trainer, 0, 0
    return trainer, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _release(device: torch.device) -> None:
    """Releases the memory of deleted trainers."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
