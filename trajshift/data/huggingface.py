"""Labelled images through Hugging Face `datasets`: hub ids, saved folders, parquet files, image folders.

Images are decoded and resized once. If a split fits in memory it becomes an `ArraySource` of uint8, else each
image is decoded whenever it is fetched, best by the workers of a `PrefetchLoader`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, ENOTDIR, EROFS
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajshift.data.decoded_images import DecodedImages, OpenedImages, check_test_classes, divided
from trajshift.data.folder_walk import Walk
from trajshift.data.image_folder import TEST_SPLITS, FolderImages, open_image_folder
from trajshift.data.sources import ArraySource, DatasetSource, ImageData, Source, numbered_classes
from trajshift.errors import UsageError, first_line, nearest

MEMORY_BYTES = 2**30
"""A split whose prepared images take up to this much (bytes) is held in memory."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A repository on the hub; any other name is a local path."""
_LABELS = ("label", "labels", "fine_label", "class", "target")


def load_hf(
    path_or_id: str | Path,
    *,
    train: str = "train",
    test: str | float | None = "auto",
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    subset: str | None = None,
    revision: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> ImageData:
    """Labelled images of a data set on the Hugging Face hub or in local files.

    Args:
        path_or_id: a hub id, a folder made by `save_to_disk`, a folder of parquet files, a folder of images (one
            folder per class, in `train` and `test` or not), or parquet files (`*` and `?` allowed).
        train: name of the training split.
        test: name of the test split; `auto` is the first of test, validation, valid and val, None is none. A number
            between 0 and 1 is the share of each class that is taken from the training split, always the same images.
        image: column of images; None takes the only one.
        label: column of class names or numbers; None takes the only `ClassLabel`, else a column called
            label, labels, fine_label, class or target.
        size: pixels, as for `prepare_images`; None asks for images of one size.
        channels: 1 or 3; None is what the first training image has.
        subset: configuration of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        memory_bytes: splits that take more are decoded image by image, when fetched.

    Raises:
        UsageError: `datasets` or Pillow is not installed, the data set, split or column is not found, labels are
            missing or out of range, images differ in size with no `size` given.
    """
    opened = open_images(
        path_or_id, train=train, test=test, image=image, label=label, size=size, channels=channels, subset=subset,
        revision=revision,
    )  # fmt: skip
    given = {
        "image": image not in (None, "image"),
        "label": label not in (None, "label"),
        "subset": subset,
        "revision": revision,
    }
    unused = [option for option, value in given.items() if value]
    if unused and isinstance(opened.splits["train"], FolderImages):
        raise UsageError(f"{path_or_id} is a folder of images, for which {unused[0]} has no meaning; drop it")
    for sentence in opened.notes:
        print(f"warning: {sentence}", file=sys.stderr)
    return image_data(opened, memory_bytes)


def open_images(
    path_or_id: str | Path, *, train: str, test: str | float | None, image: str | None, label: str | None,
    size: int | None, channels: int | None, subset: str | None, revision: str | None,
) -> OpenedImages:  # fmt: skip
    """What `load_hf` loads, with its arguments and errors, before it is put into sources."""
    notes: tuple[str, ...] = ()
    folder = _folder(path_or_id)
    if folder is not None:
        walk = Walk(folder)
        images_first = walk.root.with_images() or walk.root.images
        if not walk.tables and (images_first or not walk.has_other_data()):
            return open_image_folder(walk, str(path_or_id), train=train, test=test, size=size, channels=channels)
        if count := sum(1 for _ in walk.root.all_images()):
            if walk.has_class_folders():
                raise UsageError(
                    f"{walk.folder} has class folders of images and parquet or arrow files too; move one of them out,"
                    " or name the parquet files (*.parquet)"
                )
            notes = (f"{walk.folder}: {count} image files are not used, because it has parquet or arrow files too",)
    splits = _open(path_or_id, subset, revision)
    if test == "auto":
        test = next((name for name in TEST_SPLITS if name in splits and name != train), None)
    training = _split(path_or_id, splits, train)
    image = _image_column(path_or_id, training, image)
    label = _label_column(path_or_id, training, label)
    class_names, number = _classes(f"{path_or_id}, split {train!r}", training, label)

    def images(name: str, channels: int | None) -> DecodedImages:
        what, split = f"{path_or_id}, split {name!r}", _split(path_or_id, splits, name)
        labels = _numbers(what, split, label, number, class_names)
        return TableImages(what, split, image, labels, size, channels)

    opened = {"train": images(train, channels)}
    if isinstance(test, (int, float)):
        opened = divided(opened["train"], test)
    elif test is not None:
        opened["test"] = images(test, opened["train"].shape[0])
    check_test_classes(opened, class_names)
    return OpenedImages(opened, class_names, notes)


def _folder(path_or_id: str | Path) -> Path | None:
    """A local folder that was not saved by `datasets`; None for anything else."""
    path = Path(path_or_id).expanduser()
    saved = any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    return path if path.is_dir() and not saved else None


@contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """If `quiet`, `datasets` shows no progress bars."""
    datasets = _datasets()
    shown = not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet and shown:
            datasets.enable_progress_bars()


def image_data(opened: OpenedImages, memory_bytes: int = MEMORY_BYTES) -> ImageData:
    """Sources of opened images: in memory up to `memory_bytes` a split, else decoded when fetched."""
    sources = {split: _source(images, memory_bytes) for split, images in opened.splits.items()}
    names = opened.class_names
    return ImageData(train=sources["train"], test=sources.get("test"), outputs=len(names), class_names=names)


def hf_source(path_or_id: str | Path, split: str = "train", **options: Any) -> Source:
    """One split as a source of `(x uint8 [B, C, H, W], y int64 [B])`; options and errors are those of `load_hf`."""
    return load_hf(path_or_id, train=split, test=None, **options).train


class TableImages(DecodedImages):
    """Images in a column of a split that `datasets` has opened."""

    def __init__(
        self, what: str, split: Any, column: str, targets: Tensor, size: int | None, channels: int | None
    ) -> None:
        if column not in split.column_names:
            raise UsageError(f"{what}: there is no column {column!r}{nearest(column, split.column_names)}")
        self._column = column
        try:
            self._images = split.select_columns([column]).cast_column(column, _datasets().Image())
        except Exception as error:  # whatever Arrow says of numbers and the like
            raise UsageError(f"{what}: column {column!r} contains no images; set image to one that does") from error
        super().__init__(what, targets, size, channels)

    @property
    def commit(self) -> str | None:
        """The commit of the repository on the hub that the images are from; None for local files."""
        found = re.search(r"@([0-9a-f]{40})/", " ".join(self._images.info.download_checksums or ()))
        return found and found[1]

    def _image(self, number: int) -> Any:
        return self._images[number][self._column]

    def _place(self, number: int) -> str | None:
        undecoded = self._images.cast_column(self._column, _datasets().Image(decode=False))
        place: str | None = undecoded[number][self._column]["path"]
        return place


def _source(images: DecodedImages, memory_bytes: int) -> Source:
    if len(images) * images.shape.numel() > memory_bytes:
        return DatasetSource(images)
    pixels = torch.empty((len(images), *images.shape), dtype=torch.uint8)
    for number in range(len(images)):
        pixels[number] = images[number][0]
    return ArraySource((pixels, images.targets))


def _datasets() -> Any:
    try:
        import datasets
        import PIL  # noqa: F401  (datasets decodes images with it, and says so only when it meets one)
    except ImportError as error:
        raise UsageError(
            f"Hugging Face data sets need {error.name}, which is not installed; pip install 'trajshift[data]'"
        ) from error
    return datasets


def _open(path_or_id: str | Path, subset: str | None, revision: str | None) -> Mapping[str, Any]:
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    files = _parquet_files(path)
    if not files and not path.exists() and not is_hub_id(path_or_id):
        absolute = os.path.abspath(path)
        tried = "" if absolute == name else f" ({absolute})"
        raise UsageError(
            f"{name}: no such file or folder{tried}; give a path that exists, or a hub id of the form owner/name"
        )
    if not files and path.is_file():
        raise UsageError(f"{name} is a file, but not a parquet file; give a folder or parquet files")
    datasets = _datasets()
    try:
        if files:
            opened = datasets.load_dataset("parquet", data_files=[escape(file) for file in files])
        elif any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            opened = datasets.load_from_disk(str(path))
        elif path.is_dir():
            opened = _open_folder(str(path.resolve()), subset)
        else:
            opened = datasets.load_dataset(name, subset, revision=revision)
    except UsageError:
        raise
    # Whatever the library, the file system or the network raises, the user gets one sentence.
    except Exception as error:
        cause = _cause(error)
        if _of_the_library(cause, Path(files[0]).parent if files else path):
            remedy = (
                "the library keeps its copy in the folder that HF_HOME names; choose one with free space, and rerun"
            )
        elif files or path.exists():
            broken = _unreadable(map(Path, files) if files else sorted(path.rglob("*.parquet")))
            remedy = f"repair {broken}" if broken else "check the files"
        else:
            remedy = f"there is no folder {os.path.abspath(path)} either; check the id and the connection"
        raise UsageError(f"{name} cannot be opened as a data set ({first_line(cause)}); {remedy}") from error
    return opened if isinstance(opened, dict) else {"train": opened}


def is_hub_id(path_or_id: str | Path) -> bool:
    """Whether a name that is no local path is looked up on the hub: `owner/name`; a name alone is only ever local."""
    name = path_or_id if isinstance(path_or_id, str) else ""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".parquet")


def _parquet_files(path: Path) -> list[str]:
    """The parquet files that a path names, as it is written or as a pattern."""
    if path.suffix != ".parquet" or path.is_dir():
        return []
    if path.is_file():
        return [str(path)]
    return sorted(glob(os.path.join(escape(str(path.parent)) if path.parent.is_dir() else str(path.parent), path.name)))


def _cause(error: BaseException) -> BaseException:
    """The first exception of a chain; `datasets` hides it behind a message of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_the_library(error: BaseException, data: Path) -> bool:
    """Whether a disk refused the library's own copy: it is full, or may not be written."""
    if not isinstance(error, OSError) or error.errno not in (ENOSPC, EDQUOT, EACCES, EROFS, ENOTDIR):
        return False
    return not str(error.filename or "").startswith((str(data), str(data.resolve())))


def _unreadable(files: Iterable[Path]) -> Path | None:
    """The first parquet file that cannot be read to its end."""
    from pyarrow.parquet import ParquetFile

    for file in files:
        try:
            for _ in ParquetFile(file).iter_batches():
                pass
        except (OSError, ValueError):  # Arrow's own errors are ValueErrors
            return file
    return None


def _open_folder(folder: str, subset: str | None) -> Mapping[str, Any]:
    """The splits with the class names of their own parquet files: `datasets` gives all splits those of the first."""
    from pyarrow.parquet import read_schema

    datasets = _datasets()
    if any(letter in folder for letter in "*?["):
        raise UsageError(
            f"{folder}: datasets reads * ? and [ in a path as a pattern; rename the folder, or name its files"
        )
    known = datasets.get_dataset_config_names(folder)
    if subset is not None and subset not in known:
        raise UsageError(f"{folder} has no configuration {subset!r}; set subset to one of {', '.join(known)}")
    builder = datasets.load_dataset_builder(folder, subset)
    if any(
        base.__name__ == "FolderBasedBuilder" for base in type(builder).__mro__
    ):  # it would take splits and classes from the names of files
        raise UsageError(f"{folder} has its images in archives or beside other files; unpack them into class folders")
    builder.download_and_prepare()
    opened: Mapping[str, Any] = builder.as_dataset()
    for split, images in opened.items():
        first = str(builder.config.data_files[split][0])
        if first.endswith(".parquet"):
            own = datasets.Features.from_arrow_schema(read_schema(first))
            labels = {name: kind for name, kind in own.items() if isinstance(kind, datasets.ClassLabel)}
            images.info.features.update(labels)
    return opened


def _split(what: str | Path, splits: Mapping[str, Any], name: str) -> Any:
    if name not in splits:
        raise UsageError(f"{what}: there is no split {name!r}{nearest(name, splits)}")
    if len(splits[name]) == 0:
        raise UsageError(f"{what}: split {name!r} is empty; a split needs at least one image")
    return splits[name].with_format(None)


def _image_column(what: str | Path, split: Any, wanted: str | None) -> str:
    found = [name for name, kind in split.features.items() if isinstance(kind, _datasets().Image)]
    return _one_column(what, split, wanted, found, "image")


def _label_column(what: str | Path, split: Any, wanted: str | None) -> str:
    found = [name for name, kind in split.features.items() if isinstance(kind, _datasets().ClassLabel)]
    if wanted is None and not found:
        found = [name for name in _LABELS if name in split.column_names][:1]
    return _one_column(what, split, wanted, found, "label")


def _one_column(what: str | Path, split: Any, wanted: str | None, found: list[str], option: str) -> str:
    """The column the user names, else the only one found."""
    if wanted is None and len(found) == 1:
        return str(found[0])
    if wanted not in split.column_names:
        said = f"no column {wanted!r}" if wanted else f"{len(found) or 'no'} columns of {option}s"
        raise UsageError(f"{what} has {said}; set {option} to one of {', '.join(found or split.column_names)}")
    return str(wanted)


def _classes(what: str, split: Any, label: str) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Names of the classes, and the function from an entry of the column to its class number (-1: none)."""
    feature = split.features[label]
    if isinstance(feature, _datasets().ClassLabel):
        names = tuple(feature.names)
    else:
        entries = set(_entries(what, split, label))
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
            words = {name: number for number, name in enumerate(sorted(map(str, entries)))}
            return tuple(words), lambda entry: words.get(str(entry), -1)
        names = numbered_classes(max(entries), f"{what}: column {label!r}")
    places = {name: number for number, name in enumerate(names)}
    return names, lambda entry: entry if isinstance(entry, int) else places.get(entry, -1)


def _entries(what: str, split: Any, label: str) -> list[Any]:
    """The column of class names or numbers; another kind of column is refused before it is read."""
    if label not in split.column_names:
        raise UsageError(f"{what}: there is no column {label!r}{nearest(label, split.column_names)}")
    feature, kinds = split.features[label], (_datasets().ClassLabel, _datasets().Value)
    if not isinstance(feature, kinds) or not re.match("u?int|(large_)?string|bool", feature.dtype):
        raise UsageError(f"{what}: column {label!r} contains no class names or numbers; set label to one that does")
    entries: list[Any] = split.select_columns([label])[:][label]
    if None in entries:
        raise UsageError(f"{what}: label {entries.index(None)} is missing; drop the row or choose another split")
    return entries


def _numbers(what: str, split: Any, label: str, number: Callable[[Any], int], classes: tuple[str, ...]) -> Tensor:
    """The training class number of each example; a split may have fewer classes than training, or another order."""
    entries = _entries(what, split, label)
    own = getattr(split.features[label], "names", None)
    if own is not None:
        entries = [own[entry] if 0 <= entry < len(own) else entry for entry in entries]
        known = set(classes)
        unknown = [entry for entry in entries if isinstance(entry, str) and entry not in known]
        if unknown:
            raise UsageError(
                f"{what}: class {unknown[0]!r} of column {label!r} is not one of the {len(classes)} training classes;"
                " choose another split or label column"
            )
    numbers = torch.tensor([number(entry) for entry in entries])
    wrong = torch.nonzero((numbers < 0) | (numbers >= len(classes))).flatten().tolist()
    if wrong:
        raise UsageError(
            f"{what}: label {entries[wrong[0]]!r} of image {wrong[0]} is not one of the {len(classes)} training"
            " classes; choose another split or label column"
        )
    return numbers
