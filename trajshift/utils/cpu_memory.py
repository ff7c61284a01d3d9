"""The allocator of the CPU."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE = 2**30  # bytes


@cache
def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step instead of returning it to the system; does nothing elsewhere.

    By default large activations are mapped again in each step, their pages zeroed by the kernel at first use: 10 to
    15% of the time of a ResNet20. It applies to the whole process, which then keeps the memory of its peak.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)
    mallopt(_M_ARENA_MAX, 1)  # a thread's own arena could only grow to 64 MiB
