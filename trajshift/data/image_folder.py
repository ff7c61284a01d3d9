"""A folder of images, one folder per class: `train/CLASS/*` and `test/CLASS/*`, or `CLASS/*`.

The folder is read by our own walk: links are followed, names are taken as they are, a file is an image if Pillow
opens it, and what is passed over is counted by reason. Any other layout is refused.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from trajshift.data.decoded_images import DecodedImages, OpenedImages, check_test_classes, divided
from trajshift.data.folder_walk import Folder, Walk
from trajshift.errors import UsageError, nearest

TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names of a test split that `auto` looks for, in this order."""
WANTED = "train/CLASS/* and test/CLASS/*, or CLASS/* with options.test as a share such as 0.2"

_BLOCK = 4096

OUTSIDE = "outside the class folders"
NO_SPLIT = "in a folder that is neither the training nor the test split"


class FolderImages(DecodedImages):
    """Images of one split of a folder, decoded from their files; EXIF orientation is applied."""

    def __init__(
        self, what: str, folder: str, files: Sequence[str], targets: Tensor, size: int | None, channels: int | None
    ) -> None:
        self.folder, self.files = folder, files
        super().__init__(what, targets, size, channels)

    def _image(self, number: int) -> Any:
        from PIL import Image, ImageOps

        with Image.open(self.files[number]) as image:
            return ImageOps.exif_transpose(image)

    def _place(self, number: int) -> str:
        return self.files[number]

    @property
    def paths(self) -> list[str]:
        """The files of the chosen images."""
        return [self.files[number] for number in self.numbers.tolist()]

    @property
    def listing(self) -> str:
        """A digest of the names and sizes of the image files."""
        digest = sha256()
        for path in self.paths:
            digest.update(os.fsencode(os.path.relpath(path, self.folder)) + b"\0%d\0" % os.stat(path).st_size)
        return digest.hexdigest()


def open_image_folder(
    walk: Walk, what: str, *, train: str, test: str | float | None, size: int | None, channels: int | None
) -> OpenedImages:
    """The splits of a folder of images, with class numbers by the sorted names of the class folders.

    Raises:
        UsageError: another layout, fewer than two classes, a class that only the test split has, a file in two splits.
    """
    splits = _splits(walk, train, test)
    share = test if isinstance(test, (int, float)) else None
    if share is not None:
        _read_once(walk, splits[train])
    class_names = tuple(splits[train])
    whole = walk.root.folders.get("train")
    if train in TEST_SPLITS and test is None and whole is not None and whole.with_images():
        class_names = tuple(_classes(walk, whole, "train", 2))  # one split alone keeps the numbers of training
    numbers = {name: number for number, name in enumerate(class_names)}
    opened: dict[str, DecodedImages] = {}
    for role, (split, classes) in zip(("train", "test"), splits.items(), strict=False):
        unknown = [name for name in classes if name not in numbers]
        if unknown:
            raise UsageError(
                f"{walk.name(os.path.dirname(classes[unknown[0]][0]))} in {walk.folder}: class {unknown[0]!r} has"
                f" {len(classes[unknown[0]])} test images but no training image{nearest(unknown[0], class_names)};"
                " add training images of it, or remove its folder"
            )
        files = [file for name in classes for file in classes[name]]
        targets = torch.tensor([numbers[name] for name, own in classes.items() for _ in own])
        shape = opened["train"].shape[0] if role == "test" else channels
        opened[role] = FolderImages(f"{what}, split {split!r}", walk.folder, files, targets, size, shape)
    if share is not None:
        opened = divided(opened["train"], share)
        check_test_classes(opened, class_names)
    notes = walk.notes()
    if "test" in opened:
        notes += _shared_images(walk, opened["train"], opened["test"])
    return OpenedImages(opened, class_names, notes)


def _splits(walk: Walk, train: str, test: str | float | None) -> dict[str, dict[str, list[str]]]:
    """Files by split and class: first the training split, then the test split where there is one."""
    root, folders = walk.root, walk.root.with_images()
    if not folders and not root.images:
        seen = "; ".join(walk.notes()) or "it is empty" if os.listdir(walk.folder) else "it is empty"
        raise UsageError(f"{walk.folder} cannot be opened as a data set: no image was found ({seen}); wanted: {WANTED}")
    for name, inner in root.folders.items():
        if name not in folders and not inner.unread:
            walk.pass_over([inner.path], "folders without images")
    walk.pass_over(root.images, OUTSIDE)
    if train in folders and folders[train].with_images():
        chosen = {train: folders[train], **_test_folder(walk, folders, train, test)}
        for name, inner in folders.items():
            if name in chosen:
                continue
            if inner.images and len(chosen) == 1 and name not in TEST_SPLITS:
                raise _refused(walk, f"{train}/ contains class folders, but {name}/ images")
            if test is not None or name not in ("train", *TEST_SPLITS):  # else one split was asked for
                walk.pass_over(list(inner.all_images()), NO_SPLIT)
        return {split: _classes(walk, inner, split, 2 if split == train else 1) for split, inner in chosen.items()}
    present = [name for name in (train, *TEST_SPLITS) if name in folders]
    if train in present and (len(present) > 1 or len(folders) == 1):
        raise _refused(walk, f"{train}/ contains images, not class folders")
    if train != "train" or (isinstance(test, str) and test != "auto"):
        missing = train if train != "train" else test
        raise UsageError(f"{walk.folder}: there is no split {missing!r}{nearest(str(missing), folders)}")
    return {train: _classes(walk, root, None, 2)}


def _test_folder(walk: Walk, folders: Mapping[str, Folder], train: str, test: str | float | None) -> dict[str, Folder]:
    if test == "auto":
        test = next((name for name in TEST_SPLITS if name in folders and name != train), None)
    if not isinstance(test, str):
        return {}
    if test == train:
        raise UsageError(f"{walk.folder}: train and test are both {train!r}; name another test split, or a share")
    if test not in folders:
        raise UsageError(f"{walk.folder}: there is no split {test!r}{nearest(test, folders)}")
    return {test: folders[test]}


def _classes(walk: Walk, folder: Folder, split: str | None, least: int) -> dict[str, list[str]]:
    """The images of each class folder, names sorted; in one form of Unicode, whatever file system they come from."""
    classes: dict[str, list[str]] = {}
    folders = folder.with_images()
    for inner in folders.values():
        deeper = inner.with_images()
        if deeper:
            raise _refused(walk, f"{walk.name(inner.path)}/ contains the folder {next(iter(deeper))}/ with images")
    for name, inner in folder.folders.items():
        if name in folders:
            known = classes.setdefault(unicodedata.normalize("NFC", name), [])
            if known:
                raise UsageError(
                    f"{folder.path} has two class folders named {name!r} in two forms of Unicode; join them"
                )
            known.extend(inner.images)
        elif inner.unread:
            kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in inner.unread)
            raise UsageError(
                f"{inner.path}: none of its {len(inner.unread)} files is an image that Pillow opens"
                f" ({', '.join(sorted(kinds))}); convert them, or remove the folder"
            )
        elif split is not None:
            walk.pass_over([inner.path], "folders without images")
    if split is not None and folder.images:
        if not classes:
            raise _refused(walk, f"{split}/ contains images, not class folders")
        walk.pass_over(folder.images, OUTSIDE)
    if len(classes) < least:
        if not classes:
            raise _refused(walk, "images lie in no class folder")
        raise UsageError(
            f"{folder.path} has one class folder, {next(iter(classes))!r}; classification needs at least 2: give the"
            f" images of each class a folder of their own (wanted: {WANTED})"
        )
    return {name: classes[name] for name in sorted(classes)}


def _refused(walk: Walk, seen: str) -> UsageError:
    """The error for another layout: what is there, with one example, what is wanted, and the nearest remedy."""
    example = next(walk.root.all_images())
    depth = Counter(walk.name(path).count(os.sep) for path in walk.root.all_images())
    folders = list(walk.root.with_images())
    remedy = ""
    if len(folders) == 1 and max(depth) >= 2:
        remedy = f"; perhaps name the folder {folders[0]} inside it"
    elif len(folders) == 2 and set(depth) == {2}:
        remedy = f"; if {' and '.join(folders)} are the splits, set options.train and options.test to their names"
    return UsageError(
        f"{walk.folder} is not laid out as a folder of images: {seen} (for example {walk.name(example)});"
        f" wanted: {WANTED}{remedy}"
    )


def _read_once(walk: Walk, classes: dict[str, list[str]]) -> None:
    """Drops further names of one file, which a share could otherwise put on both sides.

    Raises:
        UsageError: one file under two classes.
    """
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for name, files in classes.items():
        kept = []
        for file in files:
            first = seen.setdefault(_identity(file), (name, file))
            if first[0] != name:
                raise UsageError(f"{walk.folder}: {walk.name(file)} and {walk.name(first[1])} are one file; remove one")
            if first[1] == file:
                kept.append(file)
            else:
                walk.pass_over([file], "further links to a file that is used")
        classes[name] = kept


def _identity(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _shared_images(walk: Walk, train: DecodedImages, test: DecodedImages) -> tuple[str, ...]:
    """A sentence that counts the test images whose content a training file has too.

    Files are compared by size first, then by a block from their middle, and only then whole.

    Raises:
        UsageError: one file in both splits.
    """
    assert isinstance(train, FolderImages)
    assert isinstance(test, FolderImages)
    trained = {_identity(file): file for file in train.paths}
    for file in test.paths:
        if _identity(file) in trained:
            first = trained[_identity(file)]
            raise UsageError(
                f"{walk.folder}: {walk.name(file)} is the same file as {walk.name(first)}, so a test image is trained"
                " on; a file may be in one split only: remove one of the two links"
            )
    left, right = train.paths, test.paths
    for digest in (os.path.getsize, _middle, _content):
        known = {path: digest(path) for path in {*left, *right}}
        both = {known[path] for path in left} & {known[path] for path in right}
        left, right = ([path for path in paths if known[path] in both] for paths in (left, right))
    if not right:
        return ()
    twin = next(path for path in left if known[path] == known[right[0]])
    return (
        f"{walk.folder}: {len(right)} of {len(test)} test images are identical to training images"
        f" ({walk.name(right[0])} is {walk.name(twin)}), so test accuracy is too high; remove them from one split",
    )


def _middle(path: str) -> tuple[int, bytes]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, (size - _BLOCK) // 2))
        return size, sha256(file.read(_BLOCK)).digest()


def _content(path: str) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        digest = sha256()
        while block := file.read(2**20):
            digest.update(block)
    return os.path.getsize(path), digest.digest()
