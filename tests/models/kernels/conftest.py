"""Without a GPU the tests of this folder run in the process that `test_interpreted.py` starts, and only there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.kernels import DEVICE, RUN_HERE
from trajshift.rng import repeatable

collect_ignore_glob = [] if RUN_HERE else ["test_[!i]*.py"]


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    """cuDNN repeats its bits, as in a run."""
    with repeatable(DEVICE):
        yield
