"""Progress on the terminal: a bar with steps per second, time left and losses, or plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from trajshift.utils.streams import say

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.text import Text

PLAIN_EVERY = 10.0
"""Seconds between plain lines where the output is no terminal."""


class Progress:
    """Counts steps, or other units, on stderr; silent where `enabled` is False (all ranks but the first)."""

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True, unit: str = "step") -> None:
        self.title = title
        self.unit = unit
        self.total = total
        self.step = start
        self.enabled = enabled
        self._first = start
        self._began = self._said = time.monotonic()
        self._remark = ""
        self._bar: Bar | None = None
        self._id: TaskID
        self._live: Live
        self._below: Text

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr is not None and sys.stderr.isatty():
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn(f"{{task.fields[rate]}} {self.unit}s/s"),
            TimeRemainingColumn(),
        )
        self._id = self._bar.add_task(self.title, total=self.total, completed=self.step, rate="-")
        self._below = Text(style="dim")
        self._live = Live(Group(self._bar, self._below), console=Console(stderr=True), refresh_per_second=4)
        self._live.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._refresh()
            self._live.stop()
            self._bar = None
        elif self.enabled and self.step > self._first:
            say(self.line())

    def rate(self) -> float:
        """Steps per second since the start of this process's part."""
        return (self.step - self._first) / max(time.monotonic() - self._began, 1e-9)

    def update(self, step: int, losses: Mapping[str, float] | None = None, note: str = "") -> None:
        """Report that `step` steps are done, with new losses of the tasks or a new remark if there are any."""
        self.step = step
        if not self.enabled:
            return
        if losses is not None:
            self._remark = loss_text(losses)
        elif note:
            self._remark = note
        if self._bar is not None:
            self._refresh()
        elif time.monotonic() - self._said > PLAIN_EVERY:
            self._said = time.monotonic()
            say(self.line())

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def _refresh(self) -> None:
        assert self._bar is not None
        self._bar.update(self._id, completed=self.step, total=self.total, rate=f"{self.rate():.3g}")
        self._below.plain = self._remark

    def line(self) -> str:
        """One plain line: steps, rate, time left, losses."""
        rate = self.rate()
        left = (self.total - self.step) / rate if rate > 0 else float("inf")
        parts = [f"{self.title}: {self.unit} {self.step}/{self.total}", f"{rate:.3g} {self.unit}s/s"]
        if self.step < self.total and left < float("inf"):
            parts.append(f"{duration(left)} left")
        if self._remark:
            parts.append(self._remark)
        return ", ".join(parts)


def loss_text(losses: Mapping[str, float]) -> str:
    """The mean loss and that of each task."""
    if not losses:
        return ""
    each = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return f"loss {sum(losses.values()) / len(losses):.3f} ({each})" if len(losses) > 1 else f"loss {each}"


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3:05 min or 2:10 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
