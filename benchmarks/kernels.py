"""The fused kernels by themselves, each against PyTorch: microseconds, bytes that must move, and the difference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import once
from benchmarks.report import Claim, Report
from trajshift.models.kernels.conv3x3 import convolution, weight_gradient
from trajshift.models.kernels.flat_update import flat_update
from trajshift.models.kernels.norm_relu import norm_relu
from trajshift.models.kernels.switch import available, eager_kernels, fused_kernels
from trajshift.rng import repeatable
from trajshift.utils.table import Table

LIMIT_FLAT = 1.2
"""Times a copy of the same bytes."""
LIMIT_WEIGHTS = 40.0
"""Microseconds, at 16 to 16 channels and 84 x 84 pixels."""
REPEATS = 10
_BATCH = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelPlan:
    """What is measured."""

    norms: Sequence[tuple[int, int]] = ((84, 16), (42, 32), (21, 64), (32, 16), (8, 64))
    """Pixels on a side, channels."""
    convolutions: Sequence[tuple[int, int, int]] = (
        (84, 16, 16), (64, 16, 16), (32, 16, 16), (84, 3, 16), (32, 3, 16), (42, 32, 32), (16, 32, 32),
    )  # fmt: skip
    """Pixels on a side, channels in and out."""
    flat: Sequence[tuple[str, int]] = (("ResNet20", 270_144), ("ResNet18", 11_176_512))
    """P."""
    rows: int = 8
    """T."""


TOY_KERNELS = KernelPlan(norms=((4, 16),), convolutions=((4, 16, 16),), flat=(("toy", 256),), rows=2)


def measure_kernels(plan: KernelPlan, device: torch.device, report: Report) -> None:
    """All kernels in bfloat16, the flat update in float32; each as often as `REPEATS` in one CUDA graph."""
    rows = []
    with repeatable(device):
        for size, channels in plan.norms:
            for added in (False, True):
                rows.append(_norm(size, channels, added, device))
        for size, cin, cout in plan.convolutions:
            rows.append(_weights(size, cin, cout, device, report))
            if cout == 16:
                rows += _convolutions(size, cin, device)
    for label, count in plan.flat:
        rows.append(_flat(label, plan.rows, count, device, report))
    how = "fused" if available(device) else "not fused, Triton does not run here"
    caption = (
        f"Batch {_BATCH}, bfloat16, forward and backward for BatchNorm; flat: T = {plan.rows}, float32. MB to be "
        f"read and written. Difference: ||fused - PyTorch|| / ||PyTorch|| of the gradients. Kernels: {how}."
    )
    report.tables.append(Table(["kernel", "MB", "PyTorch, µs", "fused, µs", "difference"], rows, caption))


def _pictures(size: int, channels: int, device: torch.device) -> Tensor:
    x = torch.randn(_BATCH, channels, size, size, device=device).to(torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def _norm(size: int, channels: int, added: bool, device: torch.device) -> list[str]:
    x, shortcut, gradient = (_pictures(size, channels, device) for _ in range(3))
    bn = nn.BatchNorm2d(channels).to(device)
    other = shortcut.requires_grad_() if added else None
    inputs = [x.requires_grad_(), bn.weight, bn.bias, *([] if other is None else [other])]

    def run() -> list[Tensor]:
        out = norm_relu(bn, x, other)
        return list(torch.autograd.grad(out, inputs, gradient))

    # x twice, out; x and the gradient twice, the gradient of x; the shortcut, out again, the shortcut's gradient
    passes = 3 + 5 + (3 if added else 0)
    name = f"BatchNorm, ReLU{', shortcut' if added else ''}: {size}x{size}, {channels}"
    return _row(name, passes * x.numel() * 2, run, device)


def _convolutions(size: int, cin: int, device: torch.device) -> list[list[str]]:
    """To 16 channels: forward, and from 16 to 16 the gradient of the input."""
    x, gradient = _pictures(size, cin, device), _pictures(size, 16, device)
    weight = torch.randn(16, cin, 3, 3, device=device).to(x).contiguous(memory_format=torch.channels_last)
    moved = 2 * (x.numel() + gradient.numel())

    def forward() -> list[Tensor]:
        return [torch.conv2d(x, weight, padding=1)]

    def back() -> list[Tensor]:
        mask = (True, False, False)
        backward = torch.ops.aten.convolution_backward
        return [backward(gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, mask)[0]]

    ours = available(device)
    fused = (lambda: [convolution(x, weight)]) if ours else forward
    rows = [_row(f"3x3 convolution: {size}x{size}, {cin} to 16", moved, forward, device, fused)]
    if cin == 16:
        fused = (lambda: [convolution(gradient, weight, flip=True)]) if ours else back
        rows.append(_row(f"gradient of its input: {size}x{size}, 16 to 16", moved, back, device, fused))
    return rows


def _weights(size: int, cin: int, cout: int, device: torch.device, report: Report) -> list[str]:
    x, gradient = _pictures(size, cin, device), _pictures(size, cout, device)
    weight = torch.randn(cout, cin, 3, 3, device=device).to(x).contiguous(memory_format=torch.channels_last)

    def plain() -> list[Tensor]:
        back = torch.ops.aten.convolution_backward
        mask = (False, True, False)
        return [back(gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, mask)[1]]

    fused = (lambda: [weight_gradient(x, gradient)]) if available(device) else plain
    name = f"gradient of 3x3 weights: {size}x{size}, {cin} to {cout}"
    row = _row(name, 2 * (x.numel() + gradient.numel()), plain, device, fused)
    if (size, cin, cout) == (84, 16, 16):
        report.claims.append(Claim(name, once(float(row[3])), LIMIT_WEIGHTS, " µs"))
    return row


def _flat(label: str, rows: int, count: int, device: torch.device, report: Report) -> list[str]:
    theta, phi = torch.randn(rows, count, device=device), torch.randn(count, device=device)
    weights = torch.full((rows,), 1.0 / rows, device=device)
    moved = 2 * (rows + 1) * count * 4
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def run() -> list[Tensor]:
        flat_update(theta, phi, weights, 0.01, shift=True)
        return []  # every run starts from the state that the previous one left

    def copy() -> list[Tensor]:
        return [target.copy_(source)]

    copied = microseconds(copy, device)
    row = _row(f"flat update: {label}, a copy {copied:.0f} µs", moved, run, device)
    if count >= 11_000_000:
        text = f"flat update of {label} over a copy of as many bytes"
        report.claims.append(Claim(text, once(float(row[3]) / copied), LIMIT_FLAT, " x"))
    return row


def _row(
    name: str, moved: int, run: Callable[[], list[Tensor]], device: torch.device,
    fused: Callable[[], list[Tensor]] | None = None,
) -> list[str]:  # fmt: skip
    """Both ways of `run`, or of `run` and `fused`."""
    with eager_kernels():
        expected, plain = run(), microseconds(run, device)
    with fused_kernels(True):
        found, ours = (fused or run)(), microseconds(fused or run, device)
    norm = torch.linalg.vector_norm
    gaps = [float(norm(a.float() - b.float()) / norm(b.float())) for a, b in zip(found, expected, strict=True)]
    gap = f"{max(gaps):.1e}" if gaps else "-"
    return [name, f"{moved / 1e6:,.1f}", f"{plain:.1f}", f"{ours:.1f}", gap]


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run: the fastest of three replays of a graph of `REPEATS`; on a CPU, of three runs."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(3):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return 1e6 * min(times)
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / REPEATS)
    return min(times)
