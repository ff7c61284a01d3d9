"""BatchNorm + ReLU (+ shortcut) of channels-last tensors, two kernels each way.

A tensor `[B, C, H, W]` is read as M = B H W rows of C numbers. The first kernel sums over rows: every program stores
partial sums at a fixed place, and the program that ends last adds them in a fixed order, so that the bits are the same
each time. The second kernel is elementwise. Arithmetic is float32, whatever the tensors are.

What all programs wrote, the last one reads: a thread's stores come before its program's barrier, the barrier before the
increment of the counter (acquire and release, for the whole device), and the last increment before the loads, which
bypass the L1 cache (`.cg`). The last program resets the counter. A launch that is cut short ends the process's use of
the device, so a counter left in between is never used again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(partial, c, programs, C: tl.constexpr, CHUNK: tl.constexpr):
    """Both sums `[C]` of all programs, in the programs' order."""
    p = tl.arange(0, CHUNK)
    first = tl.zeros((C,), tl.float32)
    second = tl.zeros((C,), tl.float32)
    for start in range(0, programs, CHUNK):
        at = partial + (start + p)[:, None] * (2 * C) + c[None, :]
        live = (start + p < programs)[:, None]
        first += tl.sum(tl.load(at, mask=live, other=0.0, cache_modifier=".cg"), 0)
        second += tl.sum(tl.load(at + C, mask=live, other=0.0, cache_modifier=".cg"), 0)
    return first, second


@triton.jit(do_not_specialize=["M"])
def statistics(
    x, partial, counter, mean, scale, inverse, weight, bias, running_mean, running_var, batches,
    M, eps, momentum, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation `[C]` of x, scale = weight / deviation, and BatchNorm's running statistics."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c, r = tl.arange(0, C), tl.arange(0, ROWS)
    origin = tl.load(x + c).to(tl.float32)  # sums of squares about a number of the same size do not cancel
    sums = tl.zeros((ROWS, C), tl.float32)
    squares = tl.zeros((ROWS, C), tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + r
        live = (rows < M)[:, None]
        value = tl.load(x + rows[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        value = tl.where(live, value - origin[None, :], 0.0)
        sums += value
        squares += value * value
    tl.store(partial + program * (2 * C) + c, tl.sum(sums, 0))
    tl.store(partial + program * (2 * C) + C + c, tl.sum(squares, 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        first, second = _total(partial, c, programs, C, CHUNK)
        away = first / M
        var = tl.maximum(second / M - away * away, 0.0)
        centre = origin + away
        inv = 1.0 / tl.sqrt(var + eps)
        tl.store(mean + c, centre)
        tl.store(inverse + c, inv)
        tl.store(scale + c, tl.load(weight + c) * inv)
        unbiased = var * (M / (M - 1.0))
        tl.store(running_mean + c, tl.load(running_mean + c) * (1.0 - momentum) + centre * momentum)
        tl.store(running_var + c, tl.load(running_var + c) * (1.0 - momentum) + unbiased * momentum)
        tl.store(batches, tl.load(batches) + 1)
        tl.store(counter, 0)


@triton.jit
def apply(x, shortcut, out, mean, scale, bias, size, C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """out = relu((x - mean) scale + bias (+ shortcut))."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK) % C
    live = i < size
    value = tl.load(x + i, mask=live, other=0.0).to(tl.float32)
    value = tl.fma(value - tl.load(mean + c), tl.load(scale + c), tl.load(bias + c))
    if ADD:
        value += tl.load(shortcut + i, mask=live, other=0.0).to(tl.float32)
    tl.store(out + i, tl.maximum(value, 0.0).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def gradient_sums(
    x, out, gradient, masked, partial, counter, mean, scale, inverse, bias, grad_weight, grad_bias, along, across,
    M, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Gradients `[C]` of weight and bias, and what `gradient_of_input` needs of them.

    With ADDED the gradient below the ReLU, which is the shortcut's, goes into `masked`.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    c, r = tl.arange(0, C), tl.arange(0, ROWS)
    centre = tl.load(mean + c)[None, :]
    factor = tl.load(scale + c)[None, :]
    offset = tl.load(bias + c)[None, :]
    sums = tl.zeros((ROWS, C), tl.float32)
    products = tl.zeros((ROWS, C), tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        rows = start + r
        live = (rows < M)[:, None]
        at = rows[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=live, other=0.0).to(tl.float32) - centre
        grad = tl.load(gradient + at, mask=live, other=0.0).to(tl.float32)
        on = tl.load(out + at, mask=live, other=0.0) > 0.0 if ADDED else tl.fma(value, factor, offset) > 0.0
        grad = tl.where(on, grad, 0.0)
        if ADDED:
            tl.store(masked + at, grad.to(masked.dtype.element_ty), mask=live)
        sums += grad
        products += grad * value
    tl.store(partial + program * (2 * C) + c, tl.sum(sums, 0))
    tl.store(partial + program * (2 * C) + C + c, tl.sum(products, 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        first, second = _total(partial, c, programs, C, CHUNK)
        inv = tl.load(inverse + c)
        tl.store(grad_bias + c, first)
        tl.store(grad_weight + c, second * inv)
        tl.store(along + c, first / M)
        tl.store(across + c, second * inv * inv / M)
        tl.store(counter, 0)


@triton.jit
def gradient_of_input(
    x, gradient, grad_x, mean, scale, bias, along, across,
    size, C: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """grad_x = scale (g - mean(g) - (x - mean) mean(g (x - mean)) / variance), g the gradient below the ReLU."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK) % C
    live = i < size
    factor = tl.load(scale + c)
    value = tl.load(x + i, mask=live, other=0.0).to(tl.float32) - tl.load(mean + c)
    grad = tl.load(gradient + i, mask=live, other=0.0).to(tl.float32)
    if not MASKED:
        grad = tl.where(tl.fma(value, factor, tl.load(bias + c)) > 0.0, grad, 0.0)
    result = (grad - tl.load(along + c) - value * tl.load(across + c)) * factor
    tl.store(grad_x + i, result.to(grad_x.dtype.element_ty), mask=live)
