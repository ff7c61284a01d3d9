"""The paper's run on a GPU: how long it would take, and the least time it could take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from benchmarks.figure import Dot, Dots
from benchmarks.harness import interleave, once, spread, timed
from benchmarks.idle import idle_percent
from benchmarks.report import Claim, Report, show_time
from benchmarks.sides.ours import advance
from benchmarks.traffic import Work, count
from benchmarks.workload import Workload, build_trainer, engine_of, random_images
from trajshift import MetaTrainer, Task
from trajshift.data.augmentation import image_task
from trajshift.models.kernels.switch import EAGER
from trajshift.utils.table import Table

STEPS = 200_000
"""K * M of section 4.2."""
LIMIT_MINUTES = 60.0
LIMIT_FLOOR = 40.0
"""Percent of the rate that the floor allows."""
LIMIT_IDLE = 3.0
"""Percent of the time without a kernel, which a trace shows as gaps."""
LIMIT_STEP = 17.0
"""Milliseconds of a meta-step: 200,000 of them take 57 minutes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the time of a step depends on in a data set."""

    name: str
    size: int
    classes: int
    images: int
    channels: int = 3
    padding: int = 8

    def task(self, device: torch.device) -> Task:
        """Random images of this shape on the device."""
        data = random_images(self.images, self.size, self.classes, channels=self.channels, device=device)
        return image_task(self.name, data, outputs=self.classes, crop_padding=self.padding, flip=True, channels=3)


SHAPES = (
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
class PaperPlan:
    """What is measured."""

    shapes: tuple[Shape, ...] = SHAPES
    workload: Workload = field(default_factory=lambda: Workload(bfloat16=True, horizon=250))
    """Four resets where the paper's K = 1000 has one."""
    block: int = 25
    rounds: int = 20
    """Blocks: 500 steps, two resets among them."""
    warmup: int = 22
    """Blocks in which the engine captures its graphs: the last kind of step comes at the end of the second round."""
    eager_steps: int = 40
    matrix: int = 8192
    """On a side, of the product that gives the rate of computing."""
    copy: int = 2 * 2**30
    """Bytes of the copy that gives the rate of moving."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A step's work and the rates of the device."""

    work: Work
    """Of PyTorch's operators."""
    fused: Work
    """With fused kernels."""
    flops_per_second: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """What a step takes at least, computing and moving at the same time, with fused kernels."""
        return self._seconds(self.fused)

    def _seconds(self, work: Work) -> float:
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)

    def rows(self) -> list[list[str]]:
        """For the table."""
        return [
            ["FLOPs of a meta-step", f"{self.work.flops / 1e12:.3f} T"],
            ["bytes of a meta-step, operators of PyTorch", f"{self.work.bytes / 1e9:.1f} GB"],
            ["bytes of a meta-step, kernels as launched", f"{self.fused.bytes / 1e9:.1f} GB"],
            ["rate of a bfloat16 matrix product", f"{self.flops_per_second / 1e12:,.0f} TFLOP/s"],
            ["rate of a copy, read and written", f"{self.bytes_per_second / 1e9:,.0f} GB/s"],
            ["floor of PyTorch's operators", show_time(once(self._seconds(self.work)))],
            ["floor of the kernels as launched", show_time(once(self.seconds))],
        ]


def measure_paper(plan: PaperPlan, device: torch.device, report: Report) -> None:
    """Steps of the paper's shapes, eager and with the fastest engine, and their floor."""
    tasks = [shape.task(device) for shape in plan.shapes]
    eager = build_trainer(plan.workload, engine="loop", device=device, tasks=tasks)
    eager.advance()
    chosen, eager.kernels = eager.kernels, EAGER
    work = count(eager.advance)
    eager.kernels = chosen
    fused = replace(work, bytes=count(eager.advance).bytes)  # products inside our kernels are not operators
    floor = Floor(work, fused, *_rates(plan, device))
    title = "the paper's run"
    slow = interleave(
        {"eager": timed(advance(eager), device)}, steps=1, rounds=plan.eager_steps, title=f"{title}, eager"
    )["eager"]
    trainer = build_trainer(plan.workload, engine="auto", device=device, tasks=tasks)
    seconds = interleave(
        {"fast": timed(advance(trainer), device)}, steps=plan.block, rounds=plan.rounds, warmup=plan.warmup, title=title
    )["fast"]
    report.samples["paper"] = {
        "seconds": seconds, "eager": slow, "flops": floor.work.flops, "bytes": floor.work.bytes,
        "fused bytes": floor.fused.bytes,
        "flops per second": floor.flops_per_second, "bytes per second": floor.bytes_per_second,
    }  # fmt: skip
    _tell(plan, report, trainer, seconds, slow, floor)
    idle = idle_percent(lambda: advance(trainer)(plan.block), device)
    if idle is not None:
        report.claims.append(Claim("the paper's run, time without a kernel", once(idle), LIMIT_IDLE, " %"))


def _tell(
    plan: PaperPlan, report: Report, trainer: MetaTrainer, seconds: list[float], slow: list[float], floor: Floor
) -> None:
    found, minutes = spread(seconds), sum(seconds) / len(seconds) * STEPS / 60
    step, eager, least = found.times(1e3), spread(slow).times(1e3), 1e3 * floor.seconds
    report.claims += [
        Claim("the paper's run, a meta-step", step, LIMIT_STEP, " ms"),
        Claim("the paper's run, whole (extrapolated)", once(minutes), LIMIT_MINUTES, " min"),
        Claim(
            "the paper's run, share of the floor's rate",
            once(100 * floor.seconds / found.median),
            LIMIT_FLOOR,
            " %",
            at_least=True,
        ),
    ]
    engine = engine_of(trainer)
    dots = [
        Dot("eager loop", eager.median, eager.low, eager.high),
        Dot(f"engine {engine}", step.median, step.low, step.high, LIMIT_STEP),
        Dot("floor", least, least, least),
    ]
    report.panels.append(Dots("The paper's run (GPU)", "ms for a meta-step", dots))
    rows = [
        ["engine", engine],
        ["a meta-step", show_time(found)],
        ["a meta-step, eager loop", show_time(spread(slow))],
        ["steps measured", f"{plan.block * plan.rounds:,}"],
        [f"{STEPS:,} steps", f"{minutes:.1f} min, the hour is {'met' if minutes <= LIMIT_MINUTES else 'missed'}"],
        *floor.rows(),
        ["a meta-step, times the floor", f"{found.median / floor.seconds:.1f}"],
    ]
    work, sizes = plan.workload, ", ".join(str(shape.size) for shape in plan.shapes)
    caption = (
        f"T = {len(plan.shapes)}, images of {sizes} pixels, {work.model}, batch {work.batch_size}, bfloat16, "
        f"K = {work.horizon}; random images on the device, as many as in the data sets. The whole run is extrapolated "
        "from the mean of the steps measured. FLOPs and bytes are those of one eager step, each operator or kernel "
        "reading and writing its tensors once; a floor is the longer of both at the rates measured here."
    )
    report.tables.append(Table(["the paper's run", ""], rows, caption))


def _rates(plan: PaperPlan, device: torch.device) -> tuple[float, float]:
    """FLOPs a second of a bfloat16 matrix product, bytes a second (read and written) of a copy."""
    matrix = torch.randn(plan.matrix, plan.matrix, device=device).to(torch.bfloat16)
    source = torch.zeros(plan.copy, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def product(steps: int) -> None:
        for _ in range(steps):
            torch.mm(matrix, matrix)

    def copy(steps: int) -> None:
        for _ in range(steps):
            target.copy_(source)

    sides = {"product": timed(product, device), "copy": timed(copy, device)}
    seconds = interleave(sides, steps=20, rounds=5, title="rates")
    return 2 * plan.matrix**3 / spread(seconds["product"]).median, 2 * plan.copy / spread(seconds["copy"]).median
