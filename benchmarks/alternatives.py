"""Ways of running equal learners that were tried and not kept: one batched call for all tasks, and compiled modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, stack_module_state, vmap

from benchmarks.harness import interleave, ratio, repeated, spread, threads, timed
from benchmarks.report import Report, show, show_time
from benchmarks.workload import TINY, Workload
from trajshift.learners.modules import to_channels_last
from trajshift.utils.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    workloads: tuple[Workload, ...]
    compiled: bool
    """Whether modules are compiled too, which takes minutes."""
    rounds: int


FULL = Plan(workloads=(Workload(batch_size=32, size=16), Workload()), compiled=True, rounds=10)
TOY = Plan(workloads=(TINY,), compiled=False, rounds=2)


def measure(*, toy: bool) -> Report:
    """Forward and backward passes of all tasks, each way, in turn; one thread."""
    plan = TOY if toy else FULL
    report = Report(title="Alternatives that were not kept (CPU)")
    rows = []
    with threads(1):
        for workload in plan.workloads:
            label = f"batch {workload.batch_size}, {workload.size}x{workload.size}"
            learners = Learners(workload)
            sides: dict[str, Callable[[int], float]] = {"one by one": timed(repeated(learners.one_by_one))}
            sides["one batched call (vmap)"] = timed(repeated(learners.batched))
            if plan.compiled:
                sides["torch.compile"] = timed(repeated(learners.compiled))
            seconds = interleave(sides, steps=1, rounds=plan.rounds, warmup=2, title=f"alternatives, {label}")
            report.samples[label] = seconds
            for name, times in seconds.items():
                gain = "1" if name == "one by one" else show(ratio(seconds["one by one"], times))
                rows.append([label, str(workload.tasks), name, show_time(spread(times)), gain])
    caption = (
        "Seconds for the forward and backward passes of all T learners; above 1 is faster than one learner after "
        "another in eager, channels-last PyTorch. The batched call is vmap over stacked parameters, its BatchNorm "
        "without running statistics, which favours it. One thread, float32; compilation itself is not counted."
    )
    report.tables.append(Table(["case", "T", "way", "a step", "times as fast"], rows, caption))
    return report


class Learners:
    """T models of one shape, and one batch for each."""

    def __init__(self, workload: Workload) -> None:
        tasks = workload.build_tasks()
        self.models = [to_channels_last(workload.build(task)).train() for task in tasks]
        generator = torch.Generator().manual_seed(0)
        shape = (workload.tasks, workload.batch_size, 3, workload.size, workload.size)
        self.x = torch.randn(shape, generator=generator)
        self.y = torch.randint(0, workload.classes, shape[:2], generator=generator)
        bare = [replace_all_batch_norm_modules_(copy.deepcopy(model)) for model in self.models]
        self.base = bare[0]
        self.parameters, _ = stack_module_state(bare)
        self._compiled: list[Callable[[Tensor], Tensor]] = []

    def one_by_one(self) -> None:
        """As the loop does it."""
        self._backward(self.models)

    def compiled(self) -> None:
        """The same with compiled modules."""
        self._compiled = self._compiled or [torch.compile(model) for model in self.models]
        self._backward(self._compiled)

    def _backward(self, calls: Sequence[Callable[[Tensor], Tensor]]) -> None:
        for model, call, x, y in zip(self.models, calls, self.x, self.y, strict=True):
            F.cross_entropy(call(x), y).backward()
            model.zero_grad(set_to_none=True)

    def batched(self) -> dict[str, Tensor]:
        """All tasks in one call: gradients by name, `[T, ...]`."""
        gradients: dict[str, Tensor] = vmap(grad(self._loss))(self.parameters, self.x, self.y)
        return gradients

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.base, parameters, (x,)), y)
