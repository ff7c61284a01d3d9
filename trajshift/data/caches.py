"""Caches of prepared images: uint8 files that are mapped into memory, never read whole, with a manifest beside.

    ROOT/NAME/
      train-images.npy   uint8 [N, C, H, W]        test-images.npy
      train-labels.npy   int64 [N]                 test-labels.npy
      manifest.json      where they are from, counts, class names, bytes and SHA-256 of each file

`trajshift.data.prepare` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajshift.data.registry import DataSet, find
from trajshift.data.sources import ImageData, MappedSource
from trajshift.errors import UsageError

MANIFEST = "manifest.json"
SPLITS = ("train", "test")


def open_cache(root: str | Path, name: str) -> ImageData:
    """The cache of a registered data set below the folder `root`, mapped; of some classes where it has but these.

    Raises:
        UsageError: an unknown name, no cache of it, or files that do not fit the manifest.
    """
    entry = find(name)
    folder = Path(root) / (entry.whole or name)
    manifest = read_manifest(folder, entry)
    names = tuple(manifest["class_names"])
    sources = {}
    for split in SPLITS:
        labels = torch.from_numpy(np.load(folder / f"{split}-labels.npy", allow_pickle=False))
        source = MappedSource(folder / f"{split}-images.npy", labels)
        if entry.members is not None:
            places, renumbered = members_only(labels, entry.members)
            source = MappedSource(source.path, renumbered, places)
        sources[split] = source
    if entry.members is not None:
        names = tuple(names[number] for number in entry.members)
    return ImageData(train=sources["train"], test=sources["test"], outputs=len(names), class_names=names)


def members_only(labels: Tensor, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Places of the examples that are in the classes `members`, and their class numbers counted in its order.

    Raises:
        UsageError: a class has no example.
    """
    order = torch.full((max(int(labels.max()), *members) + 1,), -1)
    order[list(members)] = torch.arange(len(members))
    places = torch.nonzero(order[labels] >= 0).flatten()
    renumbered = order[labels[places]]
    absent = torch.nonzero(torch.bincount(renumbered, minlength=len(members)) == 0).flatten().tolist()
    if absent:
        raise UsageError(f"class {members[absent[0]]} has no example; the data set is another than the registered one")
    return places, renumbered


def read_manifest(folder: Path, entry: DataSet) -> dict[str, Any]:
    """The manifest of a cache whose files have the sizes that it says.

    Raises:
        UsageError: no cache, or one that is damaged.
    """
    again = f"trajshift data prepare {entry.name} --root {folder.parent}"
    if not folder.is_dir():
        raise UsageError(f"there is no cache of {entry.name!r} in {folder.parent}; make it with: {again}")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        for name in (f"{split}-{part}.npy" for split in SPLITS for part in ("images", "labels")):
            found = (folder / name).stat().st_size
            if found != files[name]["bytes"]:
                raise UsageError(
                    f"{folder / name} has {found} bytes and should have {files[name]['bytes']}; remove {folder} and"
                    f" make it again with: {again}"
                )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{folder} is no whole cache ({reason}); remove it and make it again with: {again}") from error
    return manifest


def checksum(path: Path) -> str:
    """SHA-256 of a file of any size."""
    state = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def check_cache(root: Path, name: str) -> dict[str, Any]:
    """The manifest of a cache all of whose files have the checksums that it says.

    Raises:
        UsageError: no cache, or a file that is damaged.
    """
    entry = find(name)
    folder = root / (entry.whole or name)
    manifest = read_manifest(folder, entry)
    for file, about in manifest["files"].items():
        if checksum(folder / file) != about["sha256"]:
            raise UsageError(
                f"{folder / file} is damaged: its SHA-256 is not the one written when it was made; remove {folder} and"
                f" make it again with: trajshift data prepare {entry.whole or name} --root {root}"
            )
    return manifest
