"""The flat mean, update and shift alone, against a plain copy that moves the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import Spread, Steps, interleave, ratio, spread, timed
from benchmarks.report import Claim, show
from benchmarks.workload import Workload, build_trainer
from trajshift import MetaTrainer
from trajshift.utils.table import Table

LIMIT = 70.0
"""Percent of a copy's bandwidth, from `LARGE` numbers on."""
LARGE = 11_000_000


@dataclass(frozen=True, slots=True)
class Flat:
    """What was measured at one size."""

    label: str
    rows: int
    """T."""
    size: int
    """P."""
    traffic: int
    """Bytes that must move: theta and phi are read and written once."""
    seconds: Spread
    share: Spread
    """Bandwidth, as a share of the copy's."""


def flat_update(trainer: MetaTrainer) -> Steps:
    """Meta-updates and shifts of a trainer, its learners taking no step."""
    run = trainer.meta_step
    moment, losses = run.moment(run.step), run.theta.new_zeros(len(run.learners))
    assert moment.due
    assert moment.carried

    def take(count: int) -> None:
        for _ in range(count):
            run.meta_update(moment, losses)

    return take


def copies(size: int, device: torch.device) -> Steps:
    """Copies that read and write `size` bytes in all."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def take(count: int) -> None:
        for _ in range(count):
            target.copy_(source)

    return take


def measure_flat(
    cases: Sequence[tuple[str, Workload]], *, device: torch.device, block: float, rounds: int
) -> list[Flat]:
    """One `Flat` for each labelled workload; `block` is the traffic of a block of steps in bytes."""
    found = []
    for label, workload in cases:
        trainer = build_trainer(workload, engine="auto", device=device)
        trainer.advance()  # the learners take their rows
        rows, size = trainer.theta.shape
        traffic = 2 * (rows + 1) * size * trainer.theta.element_size()
        sides = {"update": timed(flat_update(trainer), device), "copy": timed(copies(traffic, device), device)}
        steps = max(1, round(block / traffic))
        seconds = interleave(sides, steps=steps, rounds=rounds, title=f"flat update, {label}")
        share = ratio(seconds["copy"], seconds["update"])
        found.append(Flat(label, rows, size, traffic, spread(seconds["update"]), share))
    return found


def flat_table(found: Sequence[Flat], where: str) -> Table:
    """The table of all sizes."""
    return Table(
        ["mean + update + shift", "T", "P", "traffic", "microseconds", "bandwidth, % of a copy's"],
        [
            [
                one.label, str(one.rows), f"{one.size:,}", f"{one.traffic / 1e6:,.0f} MB",
                f"{1e6 * one.seconds.median:,.0f}", show(one.share.times(100)),
            ]
            for one in found
        ],
        f"Traffic is what must move: theta and phi read and written once. {where}",
    )  # fmt: skip


def flat_claims(found: Sequence[Flat]) -> list[Claim]:
    """What must hold where the update is not bound by the start of its few operations."""
    return [
        Claim(f"bandwidth of the flat update against a copy's, {one.label}", one.share.times(100), LIMIT, " %", True)
        for one in found
        if one.size >= LARGE
    ]
