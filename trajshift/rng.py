"""Every random draw is a pure function of (seed, task, purpose, step, index).

A draw is named by a `key` (a hash of its parts) and a counter. Words are 32 bits wide and held in int64
tensors; multiplications stay below 2**63, so the bits are the same on every device. Nothing here has state,
so nothing has to be saved, and a batch does not depend on how it was reached.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# C. Wellons' two-round 32-bit mixer "lowbias32" (2018); constants as signed words, so that |word * constant| < 2**63.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32


def key(*parts: int | str | float) -> int:
    """A 64-bit integer that names a draw, for instance `key(seed, task.name, "augment", step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_seed(key: int) -> int:
    """The seed for `torch.manual_seed` that belongs to a key."""
    return key & (2**63 - 1)


def seed_generators(key: int, device: torch.device) -> None:
    """Seeds the global generators that a pass on `device` draws from: torch's, numpy's and that of `random`."""
    seed = generator_seed(key)
    np.random.seed(key & _MASK)
    random.seed(key)
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    # torch.manual_seed seeds every device and formats a stack trace for each absent kind of accelerator: a fifth of a
    # small step on a CPU, 0.14 ms on a GPU
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()  # until then there are no generators
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _mix(word: Tensor) -> Tensor:
    word = word & _MASK
    word = ((word ^ (word >> 16)) * _MULTIPLIER_1) & _MASK
    word = ((word ^ (word >> 15)) * _MULTIPLIER_2) & _MASK
    return word ^ (word >> 16)


def words(keys: Sequence[int]) -> Tensor:
    """Keys as int64 `[S, 2]`, low and high word: draws for many keys are then made at once, on any device."""
    return torch.tensor([[key & _MASK, key >> 32] for key in keys], dtype=torch.int64)


def bits(key: int | Tensor, counter: Tensor) -> Tensor:
    """Uniform words in [0, 2**32), int64, one for each entry of the int64 tensor `counter` `[n]` (>= 0).

    With `words` `[S, 2]` for keys, one row for each: `[S, n]`.
    """
    low, high = (key & _MASK, key >> 32) if isinstance(key, int) else key.unsqueeze(1).unbind(2)
    word = _mix((counter & _MASK) + low)
    word = _mix(word ^ high ^ (counter >> 32))
    return _mix(word + low)


def uniform(key: int, counter: Tensor) -> Tensor:
    """Uniform float32 numbers in [0, 1), multiples of 2**-24."""
    return (bits(key, counter) >> 8).to(torch.float32) * 2.0**-24


def integers(key: int | Tensor, counter: Tensor, high: int) -> Tensor:
    """Uniform int64 numbers in [0, high), for high <= 2**31 (bias below high / 2**32)."""
    return (bits(key, counter) * high) >> 32


def normal(key: int, count: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """`count` independent standard normal numbers `[count]` (Box and Muller, 1958)."""
    half = (count + 1) // 2
    words = bits(key, torch.arange(2 * half, device=device)).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[:half] + 1.0) * 2.0**-32))
    angle = words[half:] * (2.0 * math.pi * 2.0**-32)
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)))[:count].to(dtype)


def permutation(key: int, n: int, *, device: torch.device | str = "cpu") -> Tensor:
    """A random permutation of 0..n-1, int64 `[n]`; ties between words are broken by index."""
    return torch.argsort(bits(key, torch.arange(n, device=device)), stable=True)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Restores the global generators afterwards; inside, cuDNN uses only algorithms that give the same bits each time.

    By default it sums the gradients of a convolution's weights in no fixed order, and with `benchmark` the algorithm
    depends on which was faster at first use.
    """
    if device.type != "cuda":
        with torch.random.fork_rng([]), _kept_host_generators():
            yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng([device]), _kept_host_generators():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _kept_host_generators() -> Iterator[None]:
    """Restores the global generators of numpy and `random` afterwards."""
    states = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def generator_state(device: torch.device) -> Tensor:
    """State of all global generators that a pass on `device` may draw from, bytes `[n]`."""
    numpy_state: Any = np.random.get_state()
    host = bytes(numpy_state[1]) + repr((numpy_state[2:], hash(random.getstate()))).encode()
    states = [torch.get_rng_state(), torch.frombuffer(bytearray(host), dtype=torch.uint8)]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


@contextmanager
def seeded(draw: int, device: torch.device) -> Iterator[None]:
    """Runs a block under the global generators seeded by a key; they are put back afterwards."""
    with repeatable(device):
        seed_generators(draw, device)
        yield


@contextmanager
def seeded_cpu_generators(draw: int) -> Iterator[None]:
    """Seeds the CPU generators of torch, numpy and `random` from `draw`, and restores them afterwards."""
    state = torch.get_rng_state()
    try:
        with _kept_host_generators():
            seed_generators(draw, torch.device("cpu"))  # those of accelerators are left alone
            yield
    finally:
        torch.set_rng_state(state)
