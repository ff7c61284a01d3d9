"""What a run's `checkpoints/` contains, judged by names and manifests only. This module never imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.utils.files import parsed_json, shortened

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
        UsageError: it cannot be read, or is not a manifest.
    """
    try:
        return _checked(parsed_json((checkpoint / MANIFEST).read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {checkpoint} has no readable {MANIFEST} ({error}); delete it") from None


def _checked(manifest: Any) -> dict[str, Any]:
    """A manifest whose parts have the types that are relied on.

    Raises:
        ValueError: names the first that has not.
    """
    if not isinstance(manifest, dict):
        raise ValueError("it is not a mapping")
    for part in ("numbers", "files", "tasks", "extra"):
        if not isinstance(manifest.get(part), dict):
            raise ValueError(f"{part} is not a mapping")
    if not all(isinstance(manifest["numbers"].get(name), int) for name in ("step", "inner_steps")):
        raise ValueError("it has no step")
    if not isinstance(manifest["files"].get(SHARED), str):
        raise ValueError(f"it has no digest of {SHARED}")
    for name, digest in manifest["files"].items():
        if Path(name).name != name or not isinstance(digest, str):
            raise ValueError(f"its files have an entry {shortened(repr(name))}")
    return manifest
