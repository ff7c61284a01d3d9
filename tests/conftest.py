"""The networks here are tiny: a second thread costs more than it gives, above all on a busy machine."""

from __future__ import annotations

import os

# Before torch is imported; subprocesses inherit both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # tests with two threads: one that waits leaves its core to others
