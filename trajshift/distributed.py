"""Ranks: which rank trains which task, and the few messages the ranks exchange.

`torchrun` starts the processes, `torch.distributed` carries the messages; one process is world size 1 of the
same code, in which every message is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trajshift.errors import UsageError


class World:
    """The processes of this run.

    rank, size: this process and their number. local_size: processes on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_size = local_size

    @classmethod
    def current(cls, device: str = "cpu") -> World:
        """The world that `torchrun` made; starts the process group (gloo, on CUDA also NCCL) when needed."""
        if not (dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1):
            return cls()
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def place(self, device: str | torch.device) -> torch.device:
        """The device of this rank: `cuda` without a number becomes the rank's own GPU."""
        if str(device) == "cuda" and self.size > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to sum a tensor over the ranks, in place; the returned function waits for the sum and returns it."""
        work = dist.all_reduce(tensor, async_op=True) if self.size > 1 else None

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return wait

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(int(flag))) > 0)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values (numbers, strings, lists and dicts of them) of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, digest: str, what: str) -> None:
        """Stops the run unless all ranks have the same digest.

        Raises:
            UsageError: names the ranks that differ from rank 0.
        """
        digests = self.gather(digest)
        differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if differing:
            raise UsageError(
                f"{what} on rank(s) {', '.join(map(str, differing))} differs from rank 0; the run is stopped: "
                "use the same versions and hardware on all ranks, or resume from the last checkpoint"
            )

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def set_threads(world: World, threads: int | None = None) -> int:
    """Gives every process its share of the cores and returns it.

    If the processes of a machine together ask for more threads than it has cores, the share is lowered without a
    message, because oversubscription made one step 100 times slower in a trial.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // world.local_size)
    chosen = share if threads is None else max(1, min(threads, share))
    torch.set_num_threads(chosen)
    return chosen


def balance(costs: Mapping[str, float], ranks: int, kept: Mapping[str, int] | None = None) -> dict[str, int]:
    """A rank for every task, heaviest first to the least loaded rank; those in `kept` stay where they are.

    Among equally loaded ranks the one with fewer tasks takes it, so that tasks of unknown cost are spread too;
    other ties are broken by name and lowest rank.
    """
    home = dict(kept or {})
    kept_costs = [[costs[name] for name in home if home[name] == rank] for rank in range(ranks)]
    load = [(sum(ones), len(ones)) for ones in kept_costs]
    for name in sorted(costs.keys() - home.keys(), key=lambda name: (-costs[name], name)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        home[name] = rank
        load[rank] = (load[rank][0] + costs[name], load[rank][1] + 1)
    return home
