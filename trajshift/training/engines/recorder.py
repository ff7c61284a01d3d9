"""Recording device work: a protocol, and CUDA graphs over several streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

LANES = 8
"""Streams on which learners run side by side. On one H200 the paper's eight tasks take 21.2 ms on 8, 22.6 on 4, 40.6
on one (results/speed)."""

Body = Callable[[], None]


class Recorder(Protocol):
    """Records device work without doing it."""

    lanes: int
    """How many lanes there are."""

    def record(self, body: Body) -> Body:
        """Returns a function that does the work of `body` when called; recording calls `body` but does not do its work.

        Raises:
            RuntimeError: the body waits for the device, or does something else that cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """Discards all recordings."""
        ...

    def warm(self) -> AbstractContextManager[None]:
        """Surrounds a step that is not recorded."""
        ...

    def lane(self, number: int) -> AbstractContextManager[None]:
        """Work inside may run at the same time as that of other lanes."""
        ...

    def join(self) -> None:
        """What follows waits for all lanes."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool, over several streams."""

    def __init__(self, device: torch.device, lanes: int = LANES) -> None:
        self._device = device
        self.forget()
        self.lanes = lanes
        self._lanes = [torch.cuda.Stream(device) for _ in range(lanes)]
        self._used: set[int] = set()
        self._capture = torch.cuda.Stream(device)

    def record(self, body: Body) -> Body:
        """As `Recorder`."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capture):
                body()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own stream current
            raise
        return graph.replay

    def forget(self) -> None:
        """As `Recorder`; a pool of memory whose graphs are gone cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warm(self) -> Iterator[None]:
        """Runs on the stream that will record, as its first use of libraries must not be recorded."""
        self._capture.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._capture):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._capture)

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        """One of the streams."""
        self._used.add(number)
        stream = self._lanes[number]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """The current stream waits for the lanes used; one that is not part of the recording must not be waited for."""
        for number in sorted(self._used):
            torch.cuda.current_stream(self._device).wait_stream(self._lanes[number])
        self._used.clear()
