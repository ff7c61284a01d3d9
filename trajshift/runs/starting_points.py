"""Where fine-tuning starts: the initialization of a run, its checkpoints, and the phi in them.

Only loading one needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import (
    FINAL,
)
from trajshift.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor


def load_phi(source: Path) -> Mapping[str, Tensor]:
    """phi from an initialization file or a checkpoint folder."""
    from trajshift.learners.pretrained import load_start
    from trajshift.training.checkpoint import verify

    if source.is_file():
        return load_start(source)
    verify(source)
    return phi_of(source)


def phi_of(checkpoint: Path) -> Mapping[str, Tensor]:
    """phi from a checkpoint folder, of which nothing else is looked at and no checksum compared."""
    from trajshift.learners.initialization import Initialization, load_initialization

    shared = load_initialization(checkpoint / "shared.safetensors")
    prefix = "phi/"
    return Initialization({n.removeprefix(prefix): t for n, t in shared.items() if n.startswith(prefix)})


def checkpoints_of(path: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of every checkpoint kept, in order."""
    folder = RunDirectory(path).checkpoints
    found = [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    yield from sorted((int(entry.name), entry) for entry in found)


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checksums not compared."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {checkpoint} has no readable manifest.json ({error}); delete it") from None
    return manifest


def digest_of(source: Path | None) -> str | None:
    """Identifies the phi in a file or checkpoint."""
    if source is None:
        return None
    if source.is_dir():
        return str(manifest_of(source)["files"]["shared.safetensors"])[:12]
    return sha256(source.read_bytes()).hexdigest()[:12]


def digests_of(path: Path, wanted: set[str | int]) -> dict[str | int, str | None]:
    """Digests of the starting points that are still there."""
    sources: dict[str | int, Path] = dict(checkpoints_of(path))
    final = RunDirectory(path).initialization
    if final.is_file():
        sources[FINAL] = final
    return {name: digest_of(source) for name, source in sources.items() if name in wanted}
