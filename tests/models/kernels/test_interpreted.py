"""Runs this folder's tests on the CPU by Triton's interpreter, in a process of its own: it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.kernels import DEVICE


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which the dev extra brings on Linux x86_64")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU runs the kernels themselves")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreted run itself")
def test_kernels_by_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
