"""A block whose bits depend on its seeds alone, and that leaves the caller's state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Gives the global generators back as they were; cuDNN takes algorithms whose bits are the same each time.

    Without being told so it adds up the gradients of a convolution's weights in no fixed order, and with `benchmark`
    the algorithm depends on what was faster at its first use.
    """
    if device.type != "cuda":
        with torch.random.fork_rng([]):
            yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng([device]):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def generator_state(device: torch.device) -> Tensor:
    """State of all global generators that a pass on `device` may draw from, bytes `[n]`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
