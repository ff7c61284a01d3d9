"""Everything about one GPU in less than ten minutes.

The paper's run and its floor, the captured engine against the eager loop and plain training, the flat update,
memory with T, and ResNet18 at 224. A part that fails is reported as such and the others go on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.figure import Dot, Dots
from benchmarks.flat import flat_table, measure_flat
from benchmarks.harness import Spread, interleave, ratio, spread, synchronize, timed
from benchmarks.overhead import LARGE, LIMIT_FLAT, more
from benchmarks.report import Claim, Report, show, show_time
from benchmarks.sides.ours import advance
from benchmarks.sides.plain import plain
from benchmarks.traffic import Work, count
from benchmarks.workload import Workload, build_trainer, random_images
from trajshift import MetaTrainer, Task
from trajshift.data.images import image_task
from trajshift.experiments.tables import Table
from trajshift.progress import duration

PAPER_STEPS = 200_000
"""K * M of section 4.2."""
HOUR = 60.0
"""Minutes."""
LIMIT_STEP = 18.0
"""Milliseconds of a meta-step of the paper's run."""
LIMIT_CAPTURED = 5.0
LIMIT_PLAIN = 3.0
"""Percent."""
LIMIT_RESNET18 = 80.0
"""Gigabytes."""
FORMATS = {False: "float32", True: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A data set as far as time depends on it."""

    name: str
    size: int
    classes: int
    images: int
    channels: int = 3
    padding: int = 8


PAPER = (
    Shape("tiny-imagenet-1", 64, 100, 50_000),
    Shape("tiny-imagenet-2", 64, 100, 50_000),
    Shape("cifar100", 32, 100, 50_000, padding=4),
    Shape("stanford-dogs", 84, 120, 12_000),
    Shape("aircraft", 84, 100, 6_667),
    Shape("cub", 84, 200, 5_994),
    Shape("fashion-mnist", 28, 10, 60_000, channels=1),
    Shape("svhn", 32, 10, 73_257),
)
"""The eight sources of section 4.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    shapes: tuple[Shape, ...]
    paper: Workload
    paper_block: int
    paper_rounds: int
    """Blocks of the paper's run, at least 500 steps in all."""
    small: Workload
    """Of the engines' comparison."""
    warmup: int
    """Blocks in which the engine captures its graphs."""
    rounds: int
    flat: tuple[tuple[str, Workload], ...]
    flat_block: float
    memory_tasks: tuple[int, ...]
    large: Workload
    large_steps: int
    matrix: int
    """Of the product that gives the rate of computing, on a side."""
    copy: int
    """Bytes of the copy that gives the rate of moving."""


FULL = Plan(
    shapes=PAPER,
    paper=Workload(bfloat16=True),
    paper_block=25,
    paper_rounds=40,
    small=Workload(),
    warmup=2,
    rounds=20,
    flat=(
        ("ResNet20", Workload(batch_size=2, size=16, images=8)),
        ("ResNet18", Workload(model="resnet18", batch_size=2, images=8)),
    ),
    flat_block=1e11,
    memory_tasks=(1, 8, 32, 128),
    large=Workload(model="resnet18", size=224, batch_size=256, images=512),
    large_steps=5,
    matrix=8192,
    copy=2 * 2**30,
)
_TINY = Workload(tasks=2, model="conv", width=4, batch_size=4, size=8, images=16)
TOY = Plan(
    shapes=(Shape("grey", 8, 3, 16, channels=1), Shape("coloured", 12, 2, 16)),
    paper=replace(_TINY, bfloat16=True),
    paper_block=2,
    paper_rounds=3,
    small=_TINY,
    warmup=1,
    rounds=2,
    flat=(("toy", _TINY),),
    flat_block=1e5,
    memory_tasks=(1, 2),
    large=_TINY,
    large_steps=2,
    matrix=64,
    copy=2**16,
)


def measure(*, toy: bool) -> Report | str:
    """All parts, or the sentence that there is no GPU."""
    if not torch.cuda.is_available():
        return "gpu: there is no CUDA device on this machine, so nothing was measured"
    return measure_on(torch.device("cuda"), TOY if toy else FULL)


def measure_on(device: torch.device, plan: Plan) -> Report:
    """All parts on a device (tests take the CPU)."""
    report = Report(title=f"On {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}")
    parts: list[Callable[[Plan, torch.device, Report], None]] = [_paper, _engines, _flat, _memory, _large]
    failed, spent = [], []
    for part in parts:
        began = time.perf_counter()
        name = part.__name__.strip("_")
        try:
            part(plan, device, report)
        except Exception as error:  # out of memory, or a step that cannot be captured: the others count all the same
            failed.append([name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else '-'}"])
        spent.append([name, duration(time.perf_counter() - began)])
        _release(device)
    if failed:
        report.tables.append(Table(["part that failed", "why"], failed, "Nothing above counts for these."))
    report.tables.append(Table(["part", "wall time"], spent, "What this benchmark took itself, set-up included."))
    return report


# -- the paper's run -------------------------------------------------------------------------------------------------


def _paper(plan: Plan, device: torch.device, report: Report) -> None:
    tasks = [_task(shape, device) for shape in plan.shapes]
    eager = build_trainer(plan.paper, engine="loop", device=device, tasks=tasks)
    eager.advance()
    work = count(eager.advance)
    flops, moved = _rates(plan, device)
    floor = work.floor(flops, moved)
    fast = build_trainer(plan.paper, engine="auto", device=device, tasks=tasks)
    steps = timed(advance(fast), device)
    block, rounds = plan.paper_block, plan.paper_rounds
    loop = interleave(
        {"eager": timed(advance(eager), device)}, steps=1, rounds=plan.rounds, title="the paper's run, eager"
    )["eager"]
    seconds = interleave(
        {"captured": steps}, steps=block, rounds=rounds, warmup=plan.warmup, title="the paper's run"
    )["captured"]  # fmt: skip
    found = spread(seconds)
    mean = sum(seconds) / len(seconds)
    minutes = mean * PAPER_STEPS / 60
    milliseconds = _scaled(found, 1e3)
    report.claims += [
        Claim("the paper's run, a meta-step", milliseconds, LIMIT_STEP, " ms"),
        Claim("the paper's run, whole (extrapolated)", Spread(minutes, minutes, minutes, 1), HOUR, " min"),
    ]
    dots = [
        Dot(name, one.median, one.low, one.high, LIMIT_STEP if name == _engine(fast) else None)
        for name, one in (
            ("eager loop", _scaled(spread(loop), 1e3)),
            (_engine(fast), milliseconds),
            ("floor", Spread(1e3 * floor, 1e3 * floor, 1e3 * floor, 1)),
        )
    ]
    report.panels.append(Dots(f"The paper's run ({report.title.removeprefix('On ')})", "ms for a meta-step", dots, True))
    sizes = ", ".join(str(shape.size) for shape in plan.shapes)
    head = f"T = {len(tasks)}, images of {sizes} pixels, {plan.paper.model}, batch {plan.paper.batch_size}, bfloat16"
    rows = [
        ["engine", _engine(fast)],
        ["a meta-step", show_time(found)],
        ["a meta-step, eager loop", show_time(spread(loop))],
        ["steps measured", f"{block * rounds:,}"],
        [f"{PAPER_STEPS:,} steps", f"{minutes:.1f} min, the hour is {'met' if minutes <= HOUR else 'missed'}"],
        *_work_rows(work, flops, moved, floor),
        ["a meta-step, times the floor", f"{found.median / floor:.1f}"],
    ]
    caption = (
        f"{head}; K = {plan.paper.horizon}, random images on the device, as many as in the data sets. The whole run is "
        f"extrapolated from the mean of the steps measured. FLOPs and bytes of one eager step by counting its operators, "
        "nothing fused; the floor is the longer of both at the rates measured here."
    )
    report.tables.append(Table(["the paper's run", ""], rows, caption))
    report.samples["paper"] = {"seconds": seconds, "eager": loop, "flops": work.flops, "bytes": work.bytes}
    report.samples["rates"] = {"flops per second": flops, "bytes per second": moved}


def _task(shape: Shape, device: torch.device) -> Task:
    data = random_images(shape.images, shape.size, shape.classes, channels=shape.channels, device=device)
    return image_task(
        shape.name, data, outputs=shape.classes, crop_padding=shape.padding, flip=True, channels=3
    )  # fmt: skip


def _rates(plan: Plan, device: torch.device) -> tuple[float, float]:
    """FLOPs a second of a bfloat16 matrix product, bytes a second (read and written) of a copy."""
    a = torch.randn(plan.matrix, plan.matrix, device=device).to(torch.bfloat16)
    source = torch.zeros(plan.copy, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def product(steps: int) -> None:
        for _ in range(steps):
            torch.mm(a, a)

    def copy(steps: int) -> None:
        for _ in range(steps):
            target.copy_(source)

    sides = {"product": timed(product, device), "copy": timed(copy, device)}
    seconds = interleave(sides, steps=20, rounds=5, title="rates")
    return 2 * plan.matrix**3 / spread(seconds["product"]).median, 2 * plan.copy / spread(seconds["copy"]).median


def _work_rows(work: Work, flops: float, moved: float, floor: float) -> list[list[str]]:
    return [
        ["FLOPs of a meta-step", f"{work.flops / 1e12:.3f} T"],
        ["bytes of a meta-step, unfused", f"{work.bytes / 1e9:.1f} GB"],
        ["rate of a bfloat16 matrix product", f"{flops / 1e12:,.0f} TFLOP/s"],
        ["rate of a copy, read and written", f"{moved / 1e9:,.0f} GB/s"],
        ["floor", f"{1e3 * floor:.2f} ms"],
    ]


# -- engines ---------------------------------------------------------------------------------------------------------


def _engines(plan: Plan, device: torch.device, report: Report) -> None:
    """Captured engine, eager loop and plain training by turns, in both formats."""
    rows, dots = [], []
    for bfloat16, name in FORMATS.items():
        workload = replace(plan.small, bfloat16=bfloat16)
        fast, eager = (build_trainer(workload, engine=engine, device=device) for engine in ("auto", "loop"))
        eager.advance()  # the learners take their rows
        steps = {"captured": advance(fast), "eager": advance(eager), "plain": plain(eager)}
        sides = {side: timed(take, device) for side, take in steps.items()}
        title = f"engines, {name}"
        seconds = interleave(sides, steps=5, rounds=plan.rounds, warmup=2 * plan.warmup, title=title)
        gain = ratio(seconds["eager"], seconds["captured"])
        extra = more(ratio(seconds["eager"], seconds["plain"]))
        report.claims.append(Claim(f"{_engine(fast)} against eager loop, {name}", gain, LIMIT_CAPTURED, " x", True))
        report.claims.append(Claim(f"eager loop over plain training, {name}", extra, LIMIT_PLAIN, " %"))
        dots.append(Dot(name, gain.median, gain.low, gain.high, LIMIT_CAPTURED))
        times = [show_time(spread(seconds[side])) for side in sides]
        rows.append([name, _engine(fast), *times, show(gain), show(extra, " %")])
        report.samples[f"engines, {name}"] = seconds
        del fast, eager, steps, sides
        _release(device)
    report.panels.append(Dots("Captured engine against the eager loop (GPU)", "times as fast", dots))
    work = plan.small
    caption = (
        f"T = {work.tasks}, {work.model}, batch {work.batch_size}, {work.size}x{work.size}; a step moves all learners, phi "
        "and theta. float32 as PyTorch sets it (convolutions may use TF32). Plain: the same learners without meta-learning."
    )
    header = ["format", "engine", "engine, a step", "eager loop", "plain", "engine to eager", "eager over plain"]
    report.tables.append(Table(header, rows, caption))


def _flat(plan: Plan, device: torch.device, report: Report) -> None:
    found = measure_flat(plan.flat, device=device, block=plan.flat_block, rounds=plan.rounds)
    report.tables.append(flat_table(found, "float32."))
    for one in found:
        if one.size >= LARGE:
            text = f"bandwidth of mean + update + shift against a copy's, {one.label}"
            report.claims.append(Claim(text, _scaled(one.share, 100), LIMIT_FLAT, " %", at_least=True))


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan, device: torch.device, report: Report) -> None:
    rows = []
    for engine in ("loop", "auto"):
        first: tuple[int, int] | None = None
        for tasks in plan.memory_tasks:
            allocated, reserved, trainer = _peak(replace(plan.small, tasks=tasks), engine, device, steps=4)
            own = _own_bytes(trainer)
            further = "-"
            if first is not None:
                further = f"{(allocated - first[1]) / (tasks - first[0]) / 1e6:.2f} MB"
            first = first or (tasks, allocated)
            name = _engine(trainer)
            cells = [f"{allocated / 1e6:,.0f} MB", f"{reserved / 1e6:,.0f} MB", further, f"{own / 1e6:.2f} MB"]
            rows.append([name, str(tasks), *cells])
            report.samples[f"memory, engine {name}, T = {tasks}"] = [allocated, reserved]
            del trainer
            _release(device)
    work = plan.small
    caption = (
        f"{work.model}, batch {work.batch_size}, {work.size}x{work.size}, float32, tasks on the same images. A further task: "
        "growth of the allocated peak since the smallest T, by task; beside it row, gradient, momentum and head."
    )
    header = ["engine", "T", "peak allocated", "reserved", "a further task", "row + gradient + momentum + head"]
    report.tables.append(Table(header, rows, caption))


def _large(plan: Plan, device: torch.device, report: Report) -> None:
    """ResNet18 at 224 on every task."""
    work = plan.large
    began_steps = 3
    _, reserved, trainer = _peak(work, "auto", device, steps=began_steps)
    sides = {"step": timed(advance(trainer), device)}
    seconds = interleave(sides, steps=1, rounds=plan.large_steps, title=f"{work.model} at {work.size}")["step"]
    gigabytes = Spread(reserved / 1e9, reserved / 1e9, reserved / 1e9, 1)
    text = f"{work.model} at {work.size}, batch {work.batch_size}, T = {work.tasks}, memory"
    report.claims.append(Claim(text, gigabytes, LIMIT_RESNET18, " GB"))
    rows = [[_engine(trainer), show_time(spread(seconds)), f"{reserved / 1e9:.1f} GB"]]
    caption = f"{work.model}, {work.size}x{work.size}, batch {work.batch_size}, T = {work.tasks}, float32."
    report.tables.append(Table(["engine", "a step", "memory reserved"], rows, caption))
    report.samples["large"] = {"seconds": seconds, "bytes": reserved}


def _peak(workload: Workload, engine: str, device: torch.device, *, steps: int) -> tuple[int, int, MetaTrainer]:
    """Most bytes allocated and reserved while a new trainer takes its first steps; 0 on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = build_trainer(workload, engine=engine, device=device)
    advance(trainer)(steps)
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), trainer
    return 0, 0, trainer


def _own_bytes(trainer: MetaTrainer) -> int:
    """Row, gradient and momentum of a task, head included."""
    head = sum(parameter.numel() for parameter in trainer.learners[0].own.values())
    return 3 * (trainer.layout.size + head) * trainer.theta.element_size()


def _engine(trainer: MetaTrainer) -> str:
    """Name of the engine that runs it."""
    return str(trainer.describe().get("engine", "loop"))


def _release(device: torch.device) -> None:
    """Gives back the memory of trainers that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _scaled(found: Spread, factor: float) -> Spread:
    return Spread(factor * found.median, factor * found.low, factor * found.high, found.count)


__all__: Sequence[str] = ["measure", "measure_on"]
