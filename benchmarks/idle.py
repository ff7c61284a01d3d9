"""Whether the device waits: the share of a stretch of time in which it runs no kernel, from a profiler trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile


def idle_percent(run: Callable[[], object], device: torch.device) -> float | None:
    """Of what `run` has the device do, first kernel to last; None for a device that the profiler does not see."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize(device)
    ranges = [event.time_range for event in trace.events() or () if event.device_type == DeviceType.CUDA]
    return gaps_percent((one.start, one.end) for one in ranges) if ranges else None


def gaps_percent(intervals: Iterable[tuple[float, float]]) -> float:
    """Percent of the time from the first start to the last end that no interval covers."""
    ordered = sorted(intervals)
    began = end = ordered[0][0]
    idle = 0.0
    for start, stop in ordered:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return 100.0 * idle / (end - began)
