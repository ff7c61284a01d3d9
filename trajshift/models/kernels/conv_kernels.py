"""3x3 convolutions with few channels, channels-last, and the gradient of their weights, summed in a fixed order.

With 16 channels on either side the gradient of the weights is nine 16 x 16 matrices, each a product over a million
pixels: bound by memory if every program keeps all nine. A pixel of x meets nine pixels of the output's gradient g, but
need not be read nine times. The tap (kh, kw) pairs g at (h, w) with x at (h + kh - 1, w + kw - 1); counted from the
pixel q at (h, w + kw - 1) it pairs g at q - (kw - 1) with x at q + (kh - 1) W. So three shifts of g along a row and
three of x along a column make all nine products, and each masks for itself what is outside the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ANY = ["H", "W", "M", "share"]
"""Arguments whose divisibility does not specialize a kernel: channels are contiguous, whatever these numbers are."""


@triton.jit
def _output_gradient(gradient, q, w, live, o, dw: tl.constexpr, W, COUT: tl.constexpr):
    """g at q - dw, transposed: `[CO, BLOCK]`."""
    inside = live & (w - dw >= 0) & (w - dw < W)
    return tl.trans(tl.load(gradient + (q - dw)[:, None] * COUT + o[None, :], mask=inside[:, None], other=0.0))


@triton.jit
def _input(x, q, h, live, i, dh: tl.constexpr, H, W, CIN: tl.constexpr, CI: tl.constexpr):
    """x at q + dh W: `[BLOCK, CI]`, channels beyond CIN zero."""
    inside = (live & (h + dh >= 0) & (h + dh < H))[:, None]
    if CIN < CI:
        inside = inside & (i < CIN)[None, :]
    return tl.load(x + (q + dh * W)[:, None] * CIN + i[None, :], mask=inside, other=0.0)


@triton.jit
def _store(partial, tap: tl.constexpr, value, o, i, CIN: tl.constexpr):
    tl.store(partial + o[:, None] * (9 * CIN) + tap * CIN + i[None, :], value, mask=(i < CIN)[None, :])


@triton.jit(do_not_specialize=_ANY)
def weight_gradient(
    x, gradient, partial, H, W, M, share,
    CIN: tl.constexpr, COUT: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums `[program, COUT, 3, 3, CIN]` of x `[B, H, W, CIN]` and g `[B, H, W, COUT]`, M = B H W pixels.

    A program takes `share` neighbouring pixels and CO of the output's channels; CI is CIN rounded up to what a matrix
    product needs.
    """
    program = tl.program_id(0)
    o, i = tl.program_id(1) * CO + tl.arange(0, CO), tl.arange(0, CI)
    s00 = tl.zeros((CO, CI), tl.float32)
    s01 = tl.zeros((CO, CI), tl.float32)
    s02 = tl.zeros((CO, CI), tl.float32)
    s10 = tl.zeros((CO, CI), tl.float32)
    s11 = tl.zeros((CO, CI), tl.float32)
    s12 = tl.zeros((CO, CI), tl.float32)
    s20 = tl.zeros((CO, CI), tl.float32)
    s21 = tl.zeros((CO, CI), tl.float32)
    s22 = tl.zeros((CO, CI), tl.float32)
    end = tl.minimum((program + 1) * share, M)
    for start in range(program * share, end, BLOCK):
        q = start + tl.arange(0, BLOCK)
        row = q // W
        w, h, live = q - row * W, row % H, q < end
        g0 = _output_gradient(gradient, q, w, live, o, -1, W, COUT)
        g1 = _output_gradient(gradient, q, w, live, o, 0, W, COUT)
        g2 = _output_gradient(gradient, q, w, live, o, 1, W, COUT)
        x0 = _input(x, q, h, live, i, -1, H, W, CIN, CI)
        x1 = _input(x, q, h, live, i, 0, H, W, CIN, CI)
        x2 = _input(x, q, h, live, i, 1, H, W, CIN, CI)
        s00 = tl.dot(g0, x0, s00)
        s01 = tl.dot(g1, x0, s01)
        s02 = tl.dot(g2, x0, s02)
        s10 = tl.dot(g0, x1, s10)
        s11 = tl.dot(g1, x1, s11)
        s12 = tl.dot(g2, x1, s12)
        s20 = tl.dot(g0, x2, s20)
        s21 = tl.dot(g1, x2, s21)
        s22 = tl.dot(g2, x2, s22)
    own = partial + program * (9 * COUT * CIN)
    _store(own, 0, s00, o, i, CIN)
    _store(own, 1, s01, o, i, CIN)
    _store(own, 2, s02, o, i, CIN)
    _store(own, 3, s10, o, i, CIN)
    _store(own, 4, s11, o, i, CIN)
    _store(own, 5, s12, o, i, CIN)
    _store(own, 6, s20, o, i, CIN)
    _store(own, 7, s21, o, i, CIN)
    _store(own, 8, s22, o, i, CIN)


@triton.jit(do_not_specialize=["programs"])
def total(partial, out, programs, size, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """out `[size]` = the sum of `[programs, size]` over programs, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK, COLUMNS), tl.float32)
    for start in range(0, programs, CHUNK):
        live = (start + p < programs)[:, None] & (column < size)[None, :]
        sums += tl.load(partial + (start + p)[:, None] * size + column[None, :], mask=live, other=0.0)
    tl.store(out + column, tl.sum(sums, 0), mask=column < size)


@triton.jit
def _tap(x, q, w, h, live, k, dh: tl.constexpr, dw: tl.constexpr, H, W, K: tl.constexpr, KPAD: tl.constexpr):
    """x at q + dh W + dw: `[BLOCK, KPAD]`, zero outside the image and beyond K channels."""
    inside = (live & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W))[:, None]
    if K < KPAD:
        inside = inside & (k < K)[None, :]
    return tl.load(x + (q + dh * W + dw)[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _filter(weight, tap: tl.constexpr, k, n, K: tl.constexpr, N: tl.constexpr, FLIP: tl.constexpr):
    """The weights of one tap `[KPAD, N]`: of `[N, 3, 3, K]`, or with FLIP of `[K, 3, 3, N]` turned around."""
    turned = k[:, None] * (9 * N) + (8 - tap) * N + n[None, :]
    straight = n[None, :] * (9 * K) + tap * K + k[:, None]
    at = turned if FLIP else straight
    return tl.load(weight + at, mask=(k < K)[:, None], other=0.0)


@triton.jit(do_not_specialize=_ANY)
def convolution(
    x, weight, out, H, W, M, share,
    K: tl.constexpr, N: tl.constexpr, KPAD: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out `[B, H, W, N]` = the 3x3 convolution of x `[B, H, W, K]`; with FLIP the gradient of a convolution's input.

    A program takes `share` neighbouring pixels, so that the nine reads of a pixel meet in the L1 cache.
    """
    program = tl.program_id(0)
    k, n = tl.arange(0, KPAD), tl.arange(0, N)
    f0 = _filter(weight, 0, k, n, K, N, FLIP)
    f1 = _filter(weight, 1, k, n, K, N, FLIP)
    f2 = _filter(weight, 2, k, n, K, N, FLIP)
    f3 = _filter(weight, 3, k, n, K, N, FLIP)
    f4 = _filter(weight, 4, k, n, K, N, FLIP)
    f5 = _filter(weight, 5, k, n, K, N, FLIP)
    f6 = _filter(weight, 6, k, n, K, N, FLIP)
    f7 = _filter(weight, 7, k, n, K, N, FLIP)
    f8 = _filter(weight, 8, k, n, K, N, FLIP)
    end = tl.minimum((program + 1) * share, M)
    for start in range(program * share, end, BLOCK):
        q = start + tl.arange(0, BLOCK)
        row = q // W
        w, h, live = q - row * W, row % H, q < end
        x0 = _tap(x, q, w, h, live, k, -1, -1, H, W, K, KPAD)
        x1 = _tap(x, q, w, h, live, k, -1, 0, H, W, K, KPAD)
        x2 = _tap(x, q, w, h, live, k, -1, 1, H, W, K, KPAD)
        x3 = _tap(x, q, w, h, live, k, 0, -1, H, W, K, KPAD)
        x4 = _tap(x, q, w, h, live, k, 0, 0, H, W, K, KPAD)
        x5 = _tap(x, q, w, h, live, k, 0, 1, H, W, K, KPAD)
        x6 = _tap(x, q, w, h, live, k, 1, -1, H, W, K, KPAD)
        x7 = _tap(x, q, w, h, live, k, 1, 0, H, W, K, KPAD)
        x8 = _tap(x, q, w, h, live, k, 1, 1, H, W, K, KPAD)
        sums = tl.dot(x0, f0)
        sums = tl.dot(x1, f1, sums)
        sums = tl.dot(x2, f2, sums)
        sums = tl.dot(x3, f3, sums)
        sums = tl.dot(x4, f4, sums)
        sums = tl.dot(x5, f5, sums)
        sums = tl.dot(x6, f6, sums)
        sums = tl.dot(x7, f7, sums)
        sums = tl.dot(x8, f8, sums)
        tl.store(out + q[:, None] * N + n[None, :], sums.to(out.dtype.element_ty), mask=live[:, None])
