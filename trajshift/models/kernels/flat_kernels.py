"""The meta-update of trajectory shifting on the matrix theta `[T, P]`, one kernel.

delta at a column needs that column alone, so the mean, phi's step and the shift need one pass: theta and phi are read
and written once, 2 (T + 1) P numbers, where separate operators move twice as many.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def meta_step(
    theta, phi, weights, partial, lr, P, T: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """delta = lr (sum_t w_t theta_t - sum_t w_t phi); phi += delta; with SHIFT theta_t += delta.

    Leaves in `partial` `[T + 1, programs]` each block's sum of every theta_t before the shift, and of delta squared.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < P
    mean = tl.zeros((BLOCK,), tl.float32)
    total = 0.0
    for t in tl.static_range(T):
        weight = tl.load(weights + t)
        total += weight
        row = tl.load(theta + tl.cast(t, tl.int64) * P + i, mask=live, other=0.0)
        mean += weight * row
        tl.store(partial + t * programs + program, tl.sum(row, 0))
    before = tl.load(phi + i, mask=live, other=0.0)
    delta = lr * (mean - total * before)
    tl.store(phi + i, before + delta, mask=live)
    tl.store(partial + T * programs + program, tl.sum(delta * delta, 0))
    if SHIFT:
        for t in tl.static_range(T):
            at = theta + tl.cast(t, tl.int64) * P + i
            tl.store(at, tl.load(at, mask=live, other=0.0) + delta, mask=live)
