"""The networks here are tiny: a second thread costs more than it gives, above all on a busy machine."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
