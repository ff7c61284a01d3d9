"""For all tests: one thread each, and figures that need not be drawn."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported; subprocesses inherit both. The networks here are tiny: a second thread costs more than it
# gives, and where a test wants two, one that waits leaves its core to others.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and laid aside: for tests of pages that look at no picture. Drawing one takes half a second."""
    figure = pytest.importorskip("matplotlib.figure")
    layout = pytest.importorskip("matplotlib.layout_engine")

    def blank(self: Any, file: Any, *, format: str | None = None, **options: Any) -> None:
        png = format == "png" or isinstance(file, (Path, BytesIO))
        content = b"\x89PNG" if png else "<?xml version='1.0'?><svg></svg>"
        if isinstance(file, Path):
            file.write_bytes(b"\x89PNG")
        else:
            file.write(content)

    monkeypatch.setattr(figure.Figure, "savefig", blank)
    monkeypatch.setattr(layout.ConstrainedLayoutEngine, "execute", lambda self, figure: None)
