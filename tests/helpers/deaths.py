"""`trajshift train` in a process that dies, or is told to stop, at a chosen place.

Under torchrun: `torchrun ... tests/helpers/deaths.py RANK PLACE COUNT -- train RECIPE ...`; that one rank dies.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Death:
    """How a process of a run ends."""

    place: str
    """`start`: `delay` seconds after the start. `step`: `delay` seconds after an inner step. `write`: inside the
    write of a checkpoint's file, half of it done. `sync`: in a checkpoint, before (odd) or after (even) its rename.
    `prune`: an old checkpoint is half deleted. `row`: half a row of metrics.jsonl is written. `end`: half of
    initialization.safetensors is."""
    count: int = 1
    """The how-many-th of its kind, counted from this process's start."""
    delay: float = 0.0
    """Seconds."""
    number: int = signal.SIGKILL
    """The signal."""
    rank: int = 0
    """The rank that gets it."""

    def now(self) -> None:
        """Ends this process, if the signal does."""
        os.kill(os.getpid(), self.number)

    def later(self) -> None:
        """The same after the delay, wherever the process then is."""
        if self.delay:
            threading.Timer(self.delay, self.now).start()
        else:
            self.now()


def train(words: list[str], death: Death | None = None) -> None:
    """The command line in this process."""
    from trajshift.cli.main import main

    if death is not None and int(os.environ.get("RANK", "0")) == death.rank:
        _PLACES[death.place](death)
    sys.argv = ["trajshift", *words]
    main()


Call = Callable[..., Any]


def _at(owner: Any, name: str, death: Death, last: Call, counts: Call | None = None) -> None:
    """Replaces `owner.name` by itself, but for the call in question, which goes to `last(original, ...)`."""
    original = getattr(owner, name)
    seen = 0

    def replaced(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += counts is None or counts(*arguments)
        if seen == death.count:
            return last(original, *arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, replaced)


def _step(death: Death) -> None:
    from trajshift.training.trainer import MetaTrainer

    def step(original: Call, trainer: MetaTrainer) -> Any:
        event = original(trainer)
        death.later()
        return event

    _at(MetaTrainer, "advance", death, step)


def _write(death: Death) -> None:
    from trajshift.training import checkpoint

    def write(original: Call, path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        death.now()

    _at(checkpoint, "_write", death, write)


def _sync(death: Death) -> None:
    from trajshift.training import checkpoint

    _at(checkpoint, "_sync_directory", death, lambda original, path: death.now())


def _prune(death: Death) -> None:
    from trajshift.training import checkpoint

    def remove(original: Call, path: Path, **options: Any) -> None:
        next(iter(path.iterdir())).unlink()
        death.now()

    _at(checkpoint.shutil, "rmtree", death, remove, lambda path: re.fullmatch(r"\d{9}", Path(path).name) is not None)


def _row(death: Death) -> None:
    from trajshift.runs.directory import RunDirectory

    def write(original: Call, directory: RunDirectory, *rows: Any) -> None:
        with open(directory.path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 3, "rou')
        death.now()

    _at(RunDirectory, "write_row", death, write)


def _end(death: Death) -> None:
    from trajshift.learners.initialization import Initialization

    def save(original: Call, phi: Initialization, path: Path) -> None:
        path.with_name(f".{path.name}.new").write_bytes(phi.to_bytes()[:100])
        death.now()

    _at(Initialization, "save", death, save)


_PLACES: dict[str, Callable[[Death], None]] = {
    "start": Death.later,
    "step": _step,
    "write": _write,
    "sync": _sync,
    "prune": _prune,
    "row": _row,
    "end": _end,
}

if __name__ == "__main__":
    rank, place, count, dashes, *words = sys.argv[1:]
    assert dashes == "--"
    train(words, Death(place, int(count), rank=int(rank)))
