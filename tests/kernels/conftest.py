"""Without a GPU the tests of this folder run in the process that `test_interpreted.py` starts, and only there."""

from __future__ import annotations

from tests.helpers.kernels import RUN_HERE

collect_ignore_glob = [] if RUN_HERE else ["test_[!i]*.py"]
