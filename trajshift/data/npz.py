"""Images in `.npz` files."""

from __future__ import annotations

import math
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

from trajshift.data.resize import prepare_images
from trajshift.data.sources import ArraySource, ImageData, numbered_classes
from trajshift.errors import UsageError, first_line

MAX_GIB = 4.0
"""The largest size of all arrays, unpacked, that is loaded without `max_gib`."""


def load_npz(
    path: str | Path, *, size: int | None = None, channels: int | None = None, max_gib: float = MAX_GIB
) -> ImageData:
    """Images from an `.npz` file, held in memory as uint8.

    The file has `x_train` uint8 `[N, H, W, C]` or `[N, H, W]`, `y_train` integer `[N]`, `x_test`, `y_test`
    likewise and, optionally, `class_names` (one string per class). Nothing is unpickled. `size` and `channels`
    are those of `prepare_images`. `max_gib`: a file whose arrays take more memory (GiB) is refused before it is read.

    Raises:
        UsageError: a file that is missing or not of this form; says which array and why.
    """
    arrays = _read_npz(Path(path), max_gib)
    names = _checked_names(path, arrays)
    train_labels = _checked_labels(path, "y_train", arrays)
    class_names = numbered_classes(int(train_labels.max()), f"{path}: y_train") if names is None else names
    outputs = len(class_names)
    sources = {}
    for split in ("train", "test"):
        x, y = _checked_images(path, f"x_{split}", arrays), _checked_labels(path, f"y_{split}", arrays)
        if len(x) != len(y):
            raise UsageError(f"{path}: x_{split} has {len(x)} images but y_{split} {len(y)} labels; give one each")
        if not 0 <= int(y.min()) <= int(y.max()) < outputs:
            known = "y_train" if names is None else "class_names"
            shift = "; subtract 1 from all" if y.min() == 1 and y.max() == outputs else ""
            raise UsageError(
                f"{path}: labels in y_{split} run from {y.min()} to {y.max()}, but {known} has {outputs} classes;"
                f" use 0 to {outputs - 1}{shift}"
            )
        _check_classes(path, class_names, train_labels, y, split, named=names is not None)
        pixels = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        images = prepare_images(pixels, size=size, channels=channels)
        sources[split] = ArraySource((images, torch.from_numpy(y)))
    return ImageData(train=sources["train"], test=sources["test"], outputs=outputs, class_names=class_names)


def _refuse_what_is_too_large(path: Path, max_gib: float) -> None:
    """Add up what the arrays state to be unpacked: in their headers, and in the archive's table."""
    with zipfile.ZipFile(path) as archive:
        total = 0
        for entry in archive.infolist():
            with archive.open(entry) as member:
                total += max(entry.file_size, _stated_bytes(member))
    if total > max_gib * 2**30:
        raise UsageError(
            f"{path}: its arrays take {total / 2**30:,.1f} GiB unpacked, and at most {max_gib:g} GiB are loaded into "
            "memory; raise options.max_gib of the task (max_gib= in Python), or make a cache or an image folder of them"
        )


def _stated_bytes(member: IO[bytes]) -> int:
    """The size of an array by its header."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return math.prod(shape) * dtype.itemsize


def _read_npz(path: Path, max_gib: float) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of an .npz file")
    try:
        _refuse_what_is_too_large(path, max_gib)
        # Opened here, because numpy leaves a file that is not an archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in wanted if name not in archive]
            if missing:
                raise UsageError(
                    f"{path}: array {missing[0]!r} is missing; the file has {', '.join(archive) or 'none'}"
                    f" and needs {', '.join(wanted)}"
                )
            return {name: archive[name] for name in (*wanted, "class_names") if name in archive}
    except UsageError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise UsageError(
            f"{path}: not a readable .npz file of plain arrays ({first_line(error)}); write it again"
        ) from error


def _check_classes(
    path: str | Path,
    class_names: tuple[str, ...],
    train_labels: np.ndarray,
    labels: np.ndarray,
    split: str,
    *,
    named: bool,
) -> None:
    """Report class numbers that no training image has, unless classes are named; refuse those that the test has."""
    counts = np.bincount(train_labels, minlength=len(class_names))
    empty = np.flatnonzero(counts == 0).tolist()
    if split == "train" and counts[0] == 0 and counts[1:].all():
        print(
            f"warning: {path}: labels in y_train run from 1 to {train_labels.max()} and none is 0; they are read as"
            f" {len(class_names)} classes, of which the first has no image; if classes are numbered from 1, subtract 1"
            " from all labels",
            file=sys.stderr,
        )
    elif split == "train" and empty and not named:
        some = ", ".join(class_names[number] for number in empty[:3]) + (", ..." if empty[3:] else "")
        print(
            f"warning: {path}: {len(empty)} of {len(class_names)} classes have no training image ({some})",
            file=sys.stderr,
        )
    elif split == "test" and (absent := sorted(set(np.unique(labels).tolist()) & set(empty))):
        raise UsageError(
            f"{path}: class {class_names[absent[0]]!r} has {np.sum(labels == absent[0])} test images but no training"
            " image; add training images of it, or remove its test images"
        )


def _checked_names(path: str | Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    names = arrays.get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise UsageError(
            f"{path}: class_names has shape {list(names.shape)} and dtype {names.dtype}; use a list, one name per class"
        )
    entries = names.tolist()
    texts = tuple(entry.decode("utf-8", "replace") if isinstance(entry, bytes) else str(entry) for entry in entries)
    if len(set(texts)) < len(texts):
        twice = next(name for number, name in enumerate(texts) if name in texts[:number])
        raise UsageError(f"{path}: class_names has {twice!r} twice; give each class a name of its own")
    return texts


def _checked_images(path: str | Path, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    images = arrays[name]
    if images.dtype != np.uint8:
        raise UsageError(f"{path}: {name} has dtype {images.dtype}{_remedy(images)}")
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise UsageError(f"{path}: {name} has shape {list(images.shape)}; use [N, H, W, C] or [N, H, W]")
    if len(images) == 0:
        raise UsageError(f"{path}: {name} is empty; a split needs at least one image")
    if images.ndim == 3:
        return images[..., None]
    if images.shape[3] not in (1, 3):
        shape, first = list(images.shape), images.shape[1]
        if first <= 4 and first < images.shape[3]:
            alpha = " without the fourth channel, if that is alpha" if first == 4 else ""
            raise UsageError(f"{path}: {name} has shape {shape}, channels first; use [N, H, W, C]{alpha}")
        print(
            f"warning: {path}: {name} has shape {shape}, which is read as {shape[3]} channels per image, all of which"
            " the model sees; if the fourth is alpha (RGBA), drop it",
            file=sys.stderr,
        )
    return images


def _remedy(images: np.ndarray) -> str:
    """What images of another type contain, and how they become uint8."""
    if images.dtype.kind not in "fiub" or images.size == 0:
        return "; use uint8, 0 to 255"
    low, high = float(images.min()), float(images.max())
    held = f" with values from {low:.4g} to {high:.4g}"
    if images.dtype.kind in "fb" and 0 <= low <= high <= 1:
        return f"{held}; use uint8, 0 to 255: (x * 255).round().astype('uint8')"
    if 0 <= low <= high <= 255:
        return f"{held}; use uint8, 0 to 255: x.round().astype('uint8')"
    return f"{held}; use uint8, 0 to 255 (scale them first)"


def _checked_labels(path: str | Path, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    labels = arrays[name]
    if labels.dtype.kind not in "iu":
        raise UsageError(f"{path}: {name} has dtype {labels.dtype}; use int64 class numbers")
    if labels.ndim != 1:
        raise UsageError(f"{path}: {name} has shape {list(labels.shape)}; use one class number per image")
    if len(labels) == 0:
        raise UsageError(f"{path}: {name} is empty; a split needs at least one image")
    return labels.astype(np.int64)
