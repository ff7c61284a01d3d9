"""Whether operations that have a fused kernel use it.

Fused kernels round differently from PyTorch's own, so a run chooses once and keeps to it. They have no second
derivatives; code that needs those runs its forward pass inside `eager_kernels()`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

FUSED, EAGER = "fused", "eager"
"""What a run calls its choice."""

_enabled = True


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Forward passes inside use fused kernels where there are any (True) or PyTorch's own; the innermost one counts."""
    global _enabled
    before = _enabled
    _enabled = enabled
    try:
        yield
    finally:
        _enabled = before


def eager_kernels() -> AbstractContextManager[None]:
    """Forward passes inside can be differentiated twice."""
    return fused_kernels(False)


def may_fuse(x: Tensor) -> bool:
    """Whether a fused kernel may take this tensor."""
    return fused_on(x.device)


def fused_on(device: torch.device) -> bool:
    """Whether fused kernels run on a device: switched on, on a GPU for which Triton compiles."""
    return _enabled and available(device)


def available(device: torch.device) -> bool:
    """Whether fused kernels run on a device at all."""
    return (device.type == "cuda" or interpreted()) and works(device)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def works(device: torch.device) -> bool:
    """Whether Triton is installed and compiles a kernel for the device; warns once where it is and does not."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)):
        return False  # older GPUs have no bfloat16
    from trajshift.models.kernels.probe import compiles

    try:
        return compiles(device)
    except Exception as error:  # a missing C compiler, an old driver: in any case PyTorch's kernels can be used
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton cannot compile for {device}, PyTorch's own kernels are used ({reason})", stacklevel=2)
        return False


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on the module's own calls, which a fused operation does not make."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def no_second_derivative(name: str) -> None:
    """Rejects a backward pass that is itself to be differentiated; called by the backward passes of fused kernels.

    Raises:
        RuntimeError: what to do instead.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} was computed by a fused kernel, which has no second derivative; run the forward pass inside "
            "trajshift.models.kernels.switch.eager_kernels()"
        )
