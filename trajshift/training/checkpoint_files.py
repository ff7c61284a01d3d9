"""What a run's `checkpoints/` contains, judged by names and manifests only. This module never imports torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError

MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
_NAME = re.compile(r"\d{9}")


def checkpoint_folders(directory: Path) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint under `directory`, by ascending steps."""
    found = directory.iterdir() if directory.is_dir() else ()
    return dict(sorted((int(path.name), path) for path in found if _NAME.fullmatch(path.name)))


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checksums not compared.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {checkpoint} has no readable {MANIFEST} ({error}); delete it") from None
    return manifest
