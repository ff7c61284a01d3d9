"""Caches of prepared images: uint8 files that are mapped into memory, never read whole, with a manifest beside them.

    ROOT/NAME/
      train-images.npy   uint8 [N, C, H, W]        test-images.npy
      train-labels.npy   int64 [N]                 test-labels.npy
      manifest.json      where they are from, counts, class names, bytes and SHA-256 of each file

`trajshift.data.cache_writer` writes them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajshift.data.registry import DataSet, differences, find
from trajshift.data.sources import ImageData, MappedSource
from trajshift.errors import UsageError, first_line
from trajshift.utils.files import parsed_json, replace_file

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
SPLITS = ("train", "test")
FILES = tuple(f"{split}-{part}.npy" for split in SPLITS for part in ("images", "labels"))


def open_cache(root: str | Path, name: str, size: int | None = None) -> ImageData:
    """The cache of a registered data set in the folder `root`, mapped; of a set that is part of another, its classes.

    Raises:
        UsageError: an unknown name, no cache of it, one of another `size` (pixels; None takes any), or files that
            cannot be read or do not fit the manifest.
    """
    entry = find(name)
    folder = Path(root) / (entry.whole or name)
    manifest = read_manifest(folder, entry, size)
    pixels = manifest["images"]["train"][-1]
    if size not in (None, pixels):
        raise UsageError(
            f"size {size} was requested, but the cache of {name!r} in {root} has {pixels} pixels; drop size, or make"
            f" another with: {_prepare(name, size, 'FOLDER')}"
        )
    names = tuple(manifest["class_names"])
    sources = {}
    for split in SPLITS:
        path, (count, *shape) = folder / f"{split}-images.npy", manifest["images"][split]
        labels = torch.from_numpy(_load(folder / f"{split}-labels.npy", "int64", [count], manifest))
        _load(path, "uint8", [count, *shape], manifest)
        source = MappedSource(path, labels)
        if entry.members is not None:
            places, renumbered = members_only(labels, entry.members)
            source = MappedSource(source.path, renumbered, places)
        sources[split] = source
    _verify(folder, manifest)
    if entry.members is not None:
        names = tuple(names[number] for number in entry.members)
    return ImageData(train=sources["train"], test=sources["test"], outputs=len(names), class_names=names)


def members_only(labels: Tensor, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Positions of the examples that are in the classes `members`, and their class numbers counted in its order.

    Raises:
        UsageError: a class has no example.
    """
    order = torch.full((max(int(labels.max()), *members) + 1,), -1)
    order[list(members)] = torch.arange(len(members))
    places = torch.nonzero(order[labels] >= 0).flatten()
    renumbered = order[labels[places]]
    absent = torch.nonzero(torch.bincount(renumbered, minlength=len(members)) == 0).flatten().tolist()
    if absent:
        raise UsageError(f"class {members[absent[0]]} has no example; the data set is not the registered one")
    return places, renumbered


def _load(path: Path, kind: str, shape: list[int], manifest: Mapping[str, Any]) -> np.ndarray:
    """An array of a cache, images mapped; rejected if it is not what the manifest states."""
    try:
        array = np.load(path, mmap_mode="r" if "images" in path.name else None, allow_pickle=False)
        found = f"{array.dtype} {list(array.shape)}"
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # whatever numpy meets in a damaged header
        raise UsageError(f"{path} is damaged ({first_line(error)}); {_anew(path.parent, manifest)}") from error
    if found != f"{kind} {shape}":
        raise UsageError(f"{path} contains {found} but should contain {kind} {shape}; {_anew(path.parent, manifest)}")
    return np.asarray(array)


def read_manifest(folder: Path, entry: DataSet, size: int | None = None) -> dict[str, Any]:
    """The manifest of a cache whose files have the sizes it states; if there is no cache, the advice names `size`.

    Raises:
        UsageError: no cache, a damaged one, or figures that differ from those of a verified entry.
    """
    if not folder.is_dir():
        command = _prepare(entry.name, size, folder.parent)
        raise UsageError(f"there is no cache of {entry.name!r} in {folder.parent}; make it with: {command}")
    try:
        manifest = _parsed((folder / MANIFEST).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in FILES}
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{folder} is an incomplete cache ({error}); {_anew(folder)}") from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    for name, found in sizes.items():
        said = manifest["files"][name]["bytes"]
        if found != said:
            raise UsageError(f"{folder / name} has {found} bytes but should have {said}; {_anew(folder, manifest)}")
    registered = find(folder.name)
    differing = figures_that_differ(manifest, registered)
    made_otherwise = [word for word in _overrides(manifest, registered) if not word.startswith("revision=")]
    if differing and registered.verified is not None and not made_otherwise:
        raise UsageError(
            f"{folder}: {differing[0]}, which was correct on {registered.verified}; {_anew(folder, manifest)}"
        )
    return manifest


def _prepare(name: str, size: int | None, root: Path | str) -> str:
    """The command that makes a cache."""
    field = "" if size in (None, find(name).size) else f" size={size}"
    return f"trajshift data prepare {name}{field} --root {root}"


def figures_that_differ(manifest: Mapping[str, Any], entry: DataSet) -> list[str]:
    """How a cache differs from the registry's entry of the whole set, one sentence each."""
    if entry.per_class is not None:
        train, test = (each * entry.classes for each in entry.per_class)
        entry = replace(entry, train_images=train, test_images=test)
    train, test = (manifest["images"][split][0] for split in SPLITS)
    return differences(entry, len(manifest["class_names"]), train, test)


_FIELDS = {
    "entry": dict, "from_local_copy": bool, "differs_from_registry": list, "class_names": list, "images": dict,
    "files": dict,
}  # fmt: skip
"""What a manifest must contain."""


def _parsed(text: bytes) -> dict[str, Any]:
    """A manifest.

    Raises:
        ValueError: it is not a manifest; says why.
    """
    manifest = parsed_json(text)
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is not a mapping")
    wrong = [field for field, kind in _FIELDS.items() if not isinstance(manifest.get(field), kind)]
    if not wrong:
        images, files = manifest["images"], manifest["files"]
        shapes = [shape for shape in images.values() if isinstance(shape, list) and [*map(type, shape)] == [int] * 4]
        whole = [about for about in files.values() if isinstance(about, dict) and {*about} >= {"bytes", "sha256"}]
        wrong += ["images"] if {*images} != {*SPLITS} or len(shapes) < len(SPLITS) else []
        wrong += ["files"] if {*files} != {*FILES} or len(whole) < len(FILES) else []
    if wrong:
        raise ValueError(f"{MANIFEST} has no valid {wrong[0]}")
    return manifest


def _overrides(manifest: Mapping[str, Any], entry: DataSet) -> list[str]:
    """The words FIELD=VALUE with which a cache was made."""
    found = {field: value for field, value in manifest["entry"].items() if value is not None}
    return [f"{field}={value}" for field, value in found.items() if value != getattr(entry, field, value)]


def _anew(folder: Path, manifest: Mapping[str, Any] | None = None) -> str:
    """Ends a sentence about a damaged cache."""
    words = [folder.name, *(_overrides(manifest, find(folder.name)) if manifest else []), "--root", str(folder.parent)]
    copy = " --from COPY" if manifest and manifest["from_local_copy"] else ""
    return f"remove {folder} and make it again with: trajshift data prepare {shlex.join(words)}{copy}"


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read {error.filename or path} ({error.strerror}); fix its permissions or its disk")


def _verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the files with their checksums, those again that were written since it was last done.

    The sizes and times of files that were found intact are kept in the cache's VERIFIED, if that can be written.

    Raises:
        UsageError: names the file that was changed.
    """
    stamps = {}
    try:
        kept = parsed_json((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        kept = None
    for name in FILES:
        state = (folder / name).stat()
        stamps[name] = [manifest["files"][name]["sha256"], state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if not (isinstance(kept, dict) and kept.get(name) == stamps[name]):
            _compare(folder / name, manifest)
    if kept != stamps:
        with suppress(OSError):  # a folder that cannot be written, or another rank that does the same
            replace_file(folder / VERIFIED, json.dumps(stamps))


def _compare(file: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a file of a cache that has another checksum than its manifest states."""
    try:
        found = checksum(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    if found != manifest["files"][file.name]["sha256"]:
        raise UsageError(
            f"{file} is damaged: its SHA-256 is not the one written when it was made; {_anew(file.parent, manifest)}"
        )


def checksum(path: Path) -> str:
    """SHA-256 of a file of any size."""
    state = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def check_cache(root: Path, name: str) -> dict[str, Any]:
    """The manifest of a cache, all of whose files have the checksums it states.

    Raises:
        UsageError: no cache, a file that is damaged, or other figures than those of a verified entry.
    """
    entry = find(name)
    folder = root / (entry.whole or name)
    manifest = read_manifest(folder, entry)
    for file in FILES:
        _compare(folder / file, manifest)
    return manifest
