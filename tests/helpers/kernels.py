"""Where fused kernels are tested: on a GPU, or interpreted on the CPU (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUN_HERE = find_spec("triton") is not None and (DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in this process."""
FULL_SIZE = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: full size takes the interpreter hours")
SLACK = 1.05 if DEVICE.type == "cuda" else 3.0
"""Times the error of PyTorch's own operation; the interpreter truncates where a GPU rounds to bfloat16."""


def distance(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())
