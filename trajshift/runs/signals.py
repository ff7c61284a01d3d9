"""SIGTERM and SIGINT in training: before it begins they end the process, then they ask for a checkpoint. Torch-free."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from trajshift.utils.streams import say


class Signals:
    """Handles SIGTERM and SIGINT from the first import to the last file of a run.

    Until `defer`, a signal ends the process with status 128 + number: nothing was computed yet that could be saved.
    From then on it is only recorded in `received`; a second SIGINT interrupts at once, which is as safe as a kill.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on there is something to save: signals are recorded."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            with suppress(Exception):  # the stream may be closed, or in use at this moment
                name = signal.Signals(number).name
                say(f"trajshift: {name} before the first step; rerun the same command to start")
            raise SystemExit(128 + number)
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
