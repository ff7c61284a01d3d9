"""From the hub, or a local copy of a repository, to a cache: each image is decoded and resized once.

Images are appended in order, so a file's length shows how far it got, and preparation resumes where it was stopped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trajshift.data.cache_reader import MANIFEST, SPLITS, checksum, members_only, read_manifest
from trajshift.data.decoded_images import DecodedImages, OpenedImages
from trajshift.data.huggingface import open_images, silenced
from trajshift.data.loader import workers_alive
from trajshift.data.registry import DataSet, differences, find
from trajshift.data.sources import shuffled_by_class
from trajshift.errors import UsageError, nearest
from trajshift.rng import key
from trajshift.utils.files import replace_file, write_json, write_to_disk
from trajshift.utils.progress import Progress

PLAN_FILE = "plan.json"
LOCK = "lock"
CHUNK_BYTES = 2**20
"""Pixels that a worker hands over at once."""
SYNC_BYTES = 16 * 2**20
"""Pixels between waits for the disk; up to this many, plus a chunk, may be lost if the machine itself goes down."""
HEADER_BYTES = 128
"""Length of an `.npy` file of no pixels."""
OVERRIDES: Mapping[str, type] = {
    "hub": str, "revision": str, "subset": str, "train": str, "test": str, "image": str, "label": str, "size": int,
}  # fmt: skip
"""Fields of an entry that `overridden` replaces."""


def overridden(entry: DataSet, values: Mapping[str, Any]) -> DataSet:
    """The entry with some of its fields replaced, which then no longer counts as verified.

    Raises:
        UsageError: an unknown field or a value of another type.
    """
    for field, value in values.items():
        if field not in OVERRIDES:
            raise UsageError(f"data set {entry.name!r} has no field {field!r} to set{nearest(field, OVERRIDES)}")
        fits = isinstance(value, OVERRIDES[field]) and not isinstance(value, bool)
        if not fits or not value or str(value).startswith("-"):
            kind = "a whole number of pixels above 0" if field == "size" else "a word"
            raise UsageError(f"{field} of data set {entry.name!r} is {value!r}; use {kind}")
    return replace(entry, **values, verified=None) if values else entry


def open_entry(entry: DataSet, copy: str | Path | None = None) -> tuple[OpenedImages, list[str]]:
    """The images that an entry describes, and how the data found differ from it, one sentence each.

    Args:
        entry: of the registry.
        copy: a local copy of the repository; None takes the hub.

    Raises:
        UsageError: data that cannot be opened, a missing split or column, labels out of range, or a verified entry
            from which the data differ.
    """
    if copy is not None and not Path(copy).expanduser().exists():
        raise UsageError(f"{copy}: no such file or folder; give a local copy of {entry.hub}")
    if copy is None and Path(entry.hub).expanduser().exists():
        raise UsageError(
            f"{entry.hub} is also a folder here and would be used instead of the repository on the hub; pass it with"
            " --from (in a recipe: options.from), or run this in another folder"
        )
    opened = open_images(
        entry.hub if copy is None else Path(copy), train=entry.train, test=entry.test, image=entry.image,
        label=entry.label, size=entry.size, channels=entry.channels, subset=entry.subset,
        revision=entry.revision,
    )  # fmt: skip
    differing = _differences(entry if entry.whole is None else find(entry.whole), opened)
    if differing and entry.verified is not None:
        raise UsageError(
            f"{entry.name}: {differing[0]}, which was correct on {entry.verified}; pin the revision of that day or"
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
        splits = {name: _few(images, counts[name], entry.name, name) for name, images in splits.items()}
    return OpenedImages(splits, names, opened.notes), differing


def _differences(entry: DataSet, opened: OpenedImages) -> list[str]:
    """Where the figures of an entry differ from what was found."""
    splits, classes = opened.splits, len(opened.class_names)
    differing = differences(entry, classes, len(splits["train"]), len(splits["test"]))
    for each, (split, images) in zip(entry.per_class or (), splits.items(), strict=False):
        short = int((torch.bincount(images.targets, minlength=classes) < each).sum())
        if short:
            differing.append(f"{short} classes of fewer than {each} images for {split} were found, 0 are registered")
    return differing


def _few(images: DecodedImages, each: int, name: str, split: str) -> DecodedImages:
    """Up to `each` random images of every class, the same whenever they are drawn, in the order of the repository."""
    classes = shuffled_by_class(images.targets, key(name, "per_class", split))
    places = torch.cat([own[:each] for own in classes]).sort().values
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
    """Writes the cache of a registered data set, or resumes writing it; returns its folder.

    For a set that has some classes of another, the whole set is prepared, once for all of them. An existing folder is
    left as it is. Unfinished work is kept in `ROOT/NAME.part` and resumes only from the same data.

    Args:
        name: of the registry.
        root: folder of the caches.
        copy: a local copy of the repository; None takes the hub.
        jobs: processes that decode; 1 is this one.
        overrides: fields of the entry to replace, see `OVERRIDES`.
        quiet: no progress and no warnings.

    Raises:
        UsageError: anything wrong with the data, or another cache of that name, finished or not.
    """
    entry = find(name)
    entry = overridden(find(entry.whole or name), overrides or {})
    folder = Path(root) / entry.name
    if not folder.exists():
        with silenced(quiet):
            opened, differing = open_entry(entry, copy)
        for sentence in () if quiet else opened.notes:
            print(f"warning: {entry.name}: {sentence}", file=sys.stderr)
        for sentence in () if quiet else differing:
            print(f"warning: {entry.name}: {sentence}; the registered figures are not verified", file=sys.stderr)
        manifest = _describe(entry, opened, differing, copied=copy is not None)
        with _part(folder) as part:
            if not folder.exists():  # else another process has finished meanwhile
                _begin(part, manifest, opened, entry.hub if copy is None else str(Path(copy).expanduser().resolve()))
                for split, images in opened.splits.items():
                    _write(part / f"{split}-images.npy", images, jobs, f"{entry.name} {split}", quiet)
                _finish(part, manifest, folder)
    _same_as_asked(read_manifest(folder, entry), entry, folder)
    return folder


def _same_as_asked(manifest: Mapping[str, Any], entry: DataSet, folder: Path) -> None:
    for field in OVERRIDES:
        asked, there = getattr(entry, field), manifest["entry"].get(field)
        if asked != there:
            raise UsageError(
                f"{folder} was made with {field} {there!r}, not {asked!r}; remove it, or name another --root"
            )


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """The folder of unfinished work, locked against other processes."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    with (part / LOCK).open("w") as lock:
        try:
            # Unlike flock's, this lock is not passed on to workers, who may outlive a parent that was killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UsageError(
                    f"{part} cannot be locked ({error.strerror}); name a --root on another disk"
                ) from error
            raise UsageError(f"{part} is being written by another process; wait for it") from None
        yield part
        with suppress(OSError):  # empty where another process has finished first
            (part / LOCK).unlink()
            part.rmdir()


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


def _begin(part: Path, manifest: Mapping[str, Any], opened: OpenedImages, source: str) -> None:
    """Keeps existing work on the same images, or starts; writes the labels.

    Raises:
        UsageError: images of another source, or prepared in another way, are there.
    """
    labels = {split: images.targets.numpy() for split, images in opened.splits.items()}
    plan = {
        **manifest,
        "source": source,
        "labels": {split: sha256(numbers.tobytes()).hexdigest() for split, numbers in labels.items()},
    }
    listings = {split: images.listing for split, images in opened.splits.items() if images.listing is not None}
    if listings:  # image files, whose order and number may have changed
        plan["files"] = listings
    try:
        there = json.loads((part / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if there != plan:
        if there and any(file.stat().st_size > HEADER_BYTES for file in part.glob("*-images.npy")):
            raise UsageError(
                f"{part} contains unfinished work: {_what_differs(there, plan)}; use the settings it was"
                f" started with, or remove {part} to start over"
            )
        for file in part.glob("*.npy"):
            file.unlink()
        replace_file(part / PLAN_FILE, json.dumps(plan))
    for split, numbers in labels.items():
        data = BytesIO()
        np.save(data, numbers)  # given a path, it does not say why writing failed
        write_to_disk(part / f"{split}-labels.npy", data.getbuffer())


def _what_differs(there: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """How the existing plan and the requested one differ."""
    begun = {**there.get("entry", {}), "source": there.get("source")}
    for field, asked in {**plan["entry"], "source": plan["source"]}.items():
        if begun.get(field) != asked:
            return f"its {field} is {begun.get(field)!r}, not {asked!r}"
    return f"{plan['source']} has changed since"


def _finish(part: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Writes the manifest and turns the unfinished work into the cache."""
    files = sorted(part.glob("*.npy"))
    manifest["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in files}
    write_json(part / MANIFEST, manifest)
    part.rename(folder)  # before the plan is deleted: a process that dies in between has lost nothing
    for scaffold in (PLAN_FILE, LOCK):
        (folder / scaffold).unlink()


class _Chunks(Dataset[Any]):
    """The images from number `first` on, uint8 `[step, C, H, W]` at a time, or what is wrong with one."""

    def __init__(self, images: DecodedImages, first: int, step: int) -> None:
        self._images, self._first, self._step = images, first, step

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
    step = max(1, CHUNK_BYTES // each)
    with path.open("ab") as file:
        done = max(0, (file.tell() - offset - SYNC_BYTES) // each - step)
        file.truncate(offset + done * each if done else 0)
        if not done:
            file.write(header.getvalue())
        loader = DataLoader(
            _Chunks(images, done, step),
            batch_size=None,
            num_workers=jobs if jobs > 1 else 0,
            # A forked worker ends when its parent is killed; one of a fork server would stay forever.
            multiprocessing_context="fork" if jobs > 1 else None,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )
        chunks = iter(loader)  # before Progress starts a thread
        advice = "lower --jobs or free some memory, and rerun the same command to resume"
        bar = Progress(title, len(images), start=done, enabled=not quiet, unit="image")
        with workers_alive(advice, fetching=True), bar as progress:
            synced = done
            for chunk in chunks:
                if isinstance(chunk, UsageError):
                    raise UsageError(
                        f"{chunk}, and rerun the same command to resume; if you drop it, remove {path.parent} first"
                    )
                file.write(chunk.numpy().data)
                done += len(chunk)
                progress.update(done)
                if (done - synced) * each >= SYNC_BYTES or done == len(images):
                    synced = done
                    file.flush()
                    os.fsync(file.fileno())
