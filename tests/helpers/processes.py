"""Real processes in milliseconds: they are forked from a clean server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.helpers.waiting import PATIENCE

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "torch.distributed", "torch._dynamo", "trajshift.runs.train", "trajshift.cli.main"]
)


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def start(
    function: Callable[..., None], *arguments: Any, log: Path, rank: int = 0, size: int = 1, port: int = 0
) -> BaseProcess:
    """Runs a function of a test module in a process of its own; what it prints goes to the end of `log`."""
    environment = {} if size == 1 else _torchrun_environment(rank, size, port)
    made = _SERVER.Process(target=_enter, args=(function, arguments, environment, str(log)), daemon=True)
    made.start()
    return made


def _torchrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def start_ranks(function: Callable[..., None], size: int, *arguments: Any, logs: Path) -> list[BaseProcess]:
    """The processes that `torchrun --nproc-per-node SIZE` would start; rank r prints to `logs/rank-r.txt`."""
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    return [
        start(function, *arguments, log=logs / f"rank-{rank}.txt", rank=rank, size=size, port=port)
        for rank in range(size)
    ]


def wait(*processes: BaseProcess) -> list[int | None]:
    """The exit statuses, minus the signal for one that a signal ended."""
    for process in processes:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
