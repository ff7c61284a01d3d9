"""From the hub, or a local copy of a repository, to a cache: each image is decoded and resized once.

Images are appended in order, so a file's length says how far it is, and preparation goes on where it was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trajshift.data.caches import MANIFEST, SPLITS, checksum, members_only, read_manifest
from trajshift.data.hashing import key
from trajshift.data.huggingface import DecodedImages, OpenedImages, open_images
from trajshift.data.registry import DataSet, find
from trajshift.data.sources import ArraySource, class_balanced_subset
from trajshift.errors import UsageError, nearest
from trajshift.progress import Progress
from trajshift.rundir import replace_file

PLAN = "plan.json"
LOCK = "lock"
CHUNK_BYTES = 2**20
"""Pixels that a worker hands over at once."""
SYNC_BYTES = 16 * 2**20
"""Pixels between waits for the disk; so many may be made again after the machine itself went down."""
OVERRIDES: Mapping[str, type] = {
    "hub": str, "revision": str, "subset": str, "train": str, "test": str, "image": str, "label": str, "size": int,
}  # fmt: skip
"""Fields of an entry that `overridden` replaces."""


def overridden(entry: DataSet, values: Mapping[str, Any]) -> DataSet:
    """The entry with some of its fields replaced, which is then verified no more.

    Raises:
        UsageError: an unknown field or a value of another type.
    """
    for field, value in values.items():
        if field not in OVERRIDES:
            raise UsageError(f"data set {entry.name!r} has no field {field!r} to set{nearest(field, OVERRIDES)}")
        if type(value) is not OVERRIDES[field] or not value or str(value).startswith("-"):
            kind = "a whole number of pixels above 0" if field == "size" else "a word"
            raise UsageError(f"{field} of data set {entry.name!r} is {value!r}; use {kind}")
    return replace(entry, **values, verified=None) if values else entry


def open_entry(entry: DataSet, copy: str | Path | None = None) -> tuple[OpenedImages, list[str]]:
    """The images that an entry stands for, and how what was found differs from it, a sentence each.

    Args:
        entry: of the registry.
        copy: a local copy of the repository; None takes the hub.

    Raises:
        UsageError: not to be opened, a split or column that is missing, labels out of range, or a verified entry
            from which the data differ.
    """
    if copy is not None and not Path(copy).expanduser().exists():
        raise UsageError(f"{copy}: no such file or folder; give a local copy of {entry.hub}")
    opened = open_images(
        entry.hub if copy is None else Path(copy), train=entry.train, test=entry.test, image=entry.image,
        label=entry.label, size=entry.size, channels=entry.channels, subset=entry.subset,
        revision=entry.revision,
    )  # fmt: skip
    differing = _differences(entry if entry.whole is None else find(entry.whole), opened)
    if differing and entry.verified is not None:
        raise UsageError(
            f"{entry.name}: {differing[0]}, which was right on {entry.verified}; pin the revision of that day or"
            " report the change"
        )
    splits, names = opened.splits, opened.class_names
    if entry.members is not None:
        if len(names) <= max(entry.members):
            raise UsageError(f"{entry.name} needs class {max(entry.members)}, but there are {len(names)} classes")
        splits = {name: images.select(*members_only(images.targets, entry.members)) for name, images in splits.items()}
        names = tuple(names[number] for number in entry.members)
    if entry.per_class is not None:
        counts = dict(zip(SPLITS, entry.per_class, strict=True))
        splits = {name: _few(images, counts[name] * len(names), entry.name, name) for name, images in splits.items()}
    return OpenedImages(splits, names), differing


def _differences(entry: DataSet, opened: OpenedImages) -> list[str]:
    """Where the figures of an entry are not what was found."""
    triples = (
        ("classes", entry.classes, len(opened.class_names)),
        (f"images in split {entry.train!r}", entry.train_images, len(opened.splits["train"])),
        (f"images in split {entry.test!r}", entry.test_images, len(opened.splits["test"])),
    )
    return [f"{found} {what} were found, {said} are registered" for what, said, found in triples if found != said]


def _few(images: DecodedImages, count: int, name: str, split: str) -> DecodedImages:
    """A class-balanced subset, the same whenever it is drawn, in the order of the repository."""
    draw = key(name, "per_class", split)
    places = class_balanced_subset(ArraySource((images.targets, images.targets)), count, draw).sort().values
    return images.select(places, images.targets[places])


def prepare_cache(
    name: str,
    root: str | Path,
    *,
    copy: str | Path | None = None,
    jobs: int = 1,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Writes the cache of a registered data set, or goes on with it; returns its folder.

    Of a set that has some classes of another the whole one is prepared, once for all of them. A folder that is
    there already is left as it is. What is half done is kept in `ROOT/NAME.part`.

    Args:
        name: of the registry.
        root: folder of the caches.
        copy: a local copy of the repository; None takes the hub.
        jobs: processes that decode; 1 is this one.
        overrides: fields of the entry to replace, see `OVERRIDES`.
        quiet: no progress and no warnings.

    Raises:
        UsageError: whatever is wrong with the data, or another cache of that name.
    """
    entry = find(name)
    entry = overridden(find(entry.whole or name), overrides or {})
    folder = Path(root) / entry.name
    if folder.exists():
        _same_as_asked(read_manifest(folder, entry), entry, folder)
        return folder
    opened, differing = open_entry(entry, copy)
    for sentence in () if quiet else differing:
        print(f"warning: {entry.name}: {sentence}; the registered figures are not verified", file=sys.stderr)
    with _part(folder) as part:
        manifest = _describe(entry, opened, differing, copied=copy is not None)
        _begin(part, manifest, opened)
        for split, images in opened.splits.items():
            _write(part / f"{split}-images.npy", images, jobs, f"{entry.name} {split}", quiet)
        files = sorted(part.glob("*.npy"))
        manifest["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in files}
        replace_file(part / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for scaffold in (PLAN, LOCK):
            (part / scaffold).unlink()
        part.rename(folder)
    return folder


def _same_as_asked(manifest: Mapping[str, Any], entry: DataSet, folder: Path) -> None:
    for field in OVERRIDES:
        asked, there = getattr(entry, field), manifest["entry"][field]
        if asked != there:
            raise UsageError(
                f"{folder} was made with {field} {there!r}, not {asked!r}; remove it, or name another --root"
            )


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """The folder of half-done work, locked against other processes."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    with (part / LOCK).open("w") as lock:
        try:
            # Unlike flock's, this lock is not passed on to workers, who may outlive a parent that was killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{part} is being written by another process; wait for it") from None
        yield part


def _describe(entry: DataSet, opened: OpenedImages, differing: list[str], *, copied: bool) -> dict[str, Any]:
    """All of the manifest that is known before an image is decoded."""
    return {
        "name": entry.name,
        "entry": {field: getattr(entry, field) for field in OVERRIDES},
        "commit": opened.splits["train"].commit,
        "from_local_copy": copied,
        "differs_from_registry": differing,
        "class_names": list(opened.class_names),
        "images": {split: [len(images), *images.shape] for split, images in opened.splits.items()},
    }


def _begin(part: Path, manifest: Mapping[str, Any], opened: OpenedImages) -> None:
    """Keeps what is there if it is of the same images, else starts anew; writes the labels."""
    labels = {split: images.targets.numpy() for split, images in opened.splits.items()}
    plan = {**manifest, "labels": {split: sha256(numbers.tobytes()).hexdigest() for split, numbers in labels.items()}}
    try:
        same = json.loads((part / PLAN).read_text(encoding="utf-8")) == plan
    except (OSError, json.JSONDecodeError):
        same = False
    if not same:
        for file in part.glob("*.npy"):
            file.unlink()
        replace_file(part / PLAN, json.dumps(plan))
    for split, numbers in labels.items():
        np.save(part / f"{split}-labels.npy", numbers)


class _Chunks(Dataset[Any]):
    """The images from number `first` on, uint8 `[n, C, H, W]` at a time, or what is wrong with one."""

    def __init__(self, images: DecodedImages, first: int) -> None:
        self._images, self._first = images, first
        self._step = max(1, CHUNK_BYTES // images.shape.numel())

    def __len__(self) -> int:
        return -(-(len(self._images) - self._first) // self._step)

    def __getitem__(self, chunk: int) -> Tensor | UsageError:
        start = self._first + chunk * self._step
        try:
            return torch.stack([self._images[n][0] for n in range(start, min(start + self._step, len(self._images)))])
        except UsageError as error:
            return error  # raised by the parent; the loader would bury its sentence in a traceback


def _ignore_interrupt(worker: int) -> None:
    """A terminal interrupts the whole process group; the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write(path: Path, images: DecodedImages, jobs: int, title: str, quiet: bool) -> None:
    """Appends to an `.npy` file the images that it does not hold yet."""
    header = BytesIO()
    shape = (len(images), *images.shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    offset, each = header.tell(), images.shape.numel()
    with path.open("ab") as file:
        done = max(0, (file.tell() - offset - SYNC_BYTES) // each)
        file.truncate(offset + done * each if done else 0)
        if not done:
            file.write(header.getvalue())
        loader = DataLoader(
            _Chunks(images, done),
            batch_size=None,
            num_workers=jobs if jobs > 1 else 0,
            # A forked worker ends when its parent was killed; one of a fork server would stay for ever.
            multiprocessing_context="fork" if jobs > 1 else None,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )
        chunks = iter(loader)  # before Progress starts a thread
        with Progress(title, len(images), start=done, enabled=not quiet, unit="image") as progress:
            synced = done
            for chunk in chunks:
                if isinstance(chunk, UsageError):
                    raise chunk
                file.write(chunk.numpy().data)
                done += len(chunk)
                progress.update(done)
                if (done - synced) * each >= SYNC_BYTES or done == len(images):
                    synced = done
                    file.flush()
                    os.fsync(file.fileno())
