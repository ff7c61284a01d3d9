"""Where examples come from: arrays in memory, map-style data sets and `.npz` files of images.

A source has a length and answers `fetch(indices)` with a batch. That is all the rest of the library asks, and
it is what exact resume and replay rest on: any batch of any step can be had again.
"""

from __future__ import annotations

import random
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from trajshift.data.hashing import permutation, seed_generators
from trajshift.data.preparation import image_tensor, prepare_images
from trajshift.errors import UsageError

if TYPE_CHECKING:
    from trajshift.task import Batch

_LABEL_NAMES = ("y", "label", "labels", "targets")


@runtime_checkable
class Source(Protocol):
    """Examples that can be asked for by number."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def fetch(self, indices: Tensor) -> Batch:
        """The batch of the examples `indices` (int64 `[B]`), in that order."""
        ...

    def to(self, device: torch.device | str) -> Source:
        """The same examples, stored on `device` where the source can be."""
        ...


class ArraySource:
    """Examples in memory: a pytree of tensors that share their first dimension, fetched by one gather each.

    Images are kept as uint8 `[N, C, H, W]`; a task's transform makes numbers of them, batch by batch.

    Raises:
        UsageError: no tensor, a leaf without a first dimension, unequal first dimensions, or no example.
    """

    def __init__(self, tree: Any, *, what: str = "the source") -> None:
        self.tree = tree_map(_as_tensor, tree)
        leaves = tree_leaves(self.tree)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
            raise UsageError(f"{what} must hold tensors whose first dimension counts the examples")
        lengths = sorted({len(leaf) for leaf in leaves})
        if len(lengths) > 1:
            raise UsageError(f"{what} has tensors of unequal length {lengths}; give each one entry per example")
        if lengths[0] == 0:
            raise UsageError(f"{what} has no examples; give it at least one")
        self._length = lengths[0]

    def __len__(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(self.tree))

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        device: torch.device = tree_leaves(self.tree)[0].device
        return device

    def fetch(self, indices: Tensor) -> Batch:
        """A copy of the examples `indices`, on the source's device."""
        # index_select copies whole rows: on the CPU 20 times as fast as tree[indices].
        return tree_map(lambda leaf: leaf.index_select(0, indices.to(leaf.device)), self.tree)

    def to(self, device: torch.device | str) -> ArraySource:
        """The same examples on `device`; shares memory where they are there already."""
        return ArraySource(tree_map(lambda leaf: leaf.to(device), self.tree))


class DatasetSource:
    """Examples of a map-style `torch.utils.data.Dataset` (or anything with a length and an index).

    A data set that draws random numbers itself stays deterministic: the generators of torch, numpy and
    `random` are seeded around each fetch (see `seeded`).

    Raises:
        UsageError: no example; at `fetch`, examples that do not stack.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch] | None = None) -> None:
        if len(dataset) == 0:
            raise UsageError(f"{type(dataset).__name__} has no examples; give it at least one")
        self.dataset = dataset
        self.collate = collate or stack_examples

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Tensor) -> Batch:
        """The collated examples `indices`, on the CPU."""
        numbers: list[int] = indices.tolist()
        if callable(getattr(self.dataset, "__getitems__", None)):
            return self.collate(self.dataset.__getitems__(numbers))
        return self.collate([self.dataset[number] for number in numbers])

    def to(self, device: torch.device | str) -> DatasetSource:
        """Itself: its examples are made on the CPU."""
        return self


class SubsetSource:
    """The examples `indices` of another source that is not held in memory."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Tensor) -> Batch:
        """The batch of the examples `indices` of the subset."""
        return self.source.fetch(self.indices[indices])

    def to(self, device: torch.device | str) -> SubsetSource:
        """The subset of the moved source."""
        return SubsetSource(self.source.to(device), self.indices)


def as_source(data: Any, *, what: str = "the source") -> Source:
    """`data` as a source: sources as they are, tensors or arrays in memory, map-style data sets.

    A tensor, and a tuple or mapping of tensors or numpy arrays (nested as you like), are held in memory, as is
    a `TensorDataset`; a list is a data set of examples.

    Raises:
        UsageError: an `IterableDataset` or anything else without a length and an index, or no examples.
    """
    if isinstance(data, Source):
        if len(data) == 0:
            raise UsageError(f"{what} has no examples; give it at least one")
        return data
    if isinstance(data, TensorDataset):
        return ArraySource(data.tensors, what=what)
    if isinstance(data, (Tensor, np.ndarray, tuple, Mapping)):
        return ArraySource(data, what=what)
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not sized:
        raise UsageError(
            f"{what} is of type {type(data).__name__}, which has no length or no index, but resume and replay ask for"
            " examples by number; use a map-style data set (one with __len__ and __getitem__)"
        )
    if len(data) == 0:
        raise UsageError(f"{what} has no examples; give it at least one")
    return DatasetSource(data)


@contextmanager
def seeded(draw: int) -> Iterator[None]:
    """The CPU generators of torch, numpy and `random` as `draw` says, and afterwards as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        seed_generators(draw, torch.device("cpu"))  # the accelerators' stay as they are
        np.random.seed(draw & 0xFFFFFFFF)
        random.seed(draw)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def subset(source: Source, indices: Tensor) -> Source:
    """The examples `indices` (int64 `[n]`) of `source`; of an `ArraySource` a copy, of others a view."""
    if isinstance(source, ArraySource):
        return ArraySource(source.fetch(indices))
    return SubsetSource(source, indices)


def class_balanced_subset(source: Source, n: int, key: int) -> Tensor:
    """Numbers of `n` random examples, int64 `[min(n, N)]`, as many of each class as can be.

    Class counts differ by at most one until a class is used up; which classes get the odd example is random.
    A smaller subset is a prefix of a larger one of the same key. Sources without integer labels (regression)
    give a plain random subset.

    Raises:
        UsageError: n < 1.
    """
    if n < 1:
        raise UsageError(f"a subset of {n} examples was asked for; use at least 1")
    order = permutation(key, len(source))
    labels = labels_of(source)
    if labels is None:
        return order[:n]
    _, shuffled, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = torch.argsort(shuffled, stable=True)
    starts = counts.cumsum(0) - counts
    rank_in_class = torch.empty_like(order)
    rank_in_class[by_class] = torch.arange(len(order)) - starts[shuffled[by_class]]
    return order[torch.argsort(rank_in_class, stable=True)][:n]


def labels_of(source: Source) -> Tensor | None:
    """The class of every example, int64 `[N]` on the CPU; None where examples carry no integer label.

    Looked for as the second of two entries, or under `y`, `label`, `labels` or `targets`. A data set that has
    no such attribute or column is read through once.
    """
    if isinstance(source, SubsetSource):
        labels = labels_of(source.source)
        return None if labels is None else labels[source.indices]
    if isinstance(source, ArraySource):
        return _integer_labels(label_entry(source.tree))
    if isinstance(source, DatasetSource):
        column = _label_column(source.dataset)
        if column is not None:
            return _integer_labels(torch.as_tensor(column))
    with seeded(0):
        entries = [label_entry(source.fetch(torch.tensor([number]))) for number in range(len(source))]
    if not all(isinstance(entry, Tensor) and len(entry) == 1 for entry in entries):
        return None
    return _integer_labels(torch.cat(entries))


def label_entry(batch: Batch) -> Any:
    """The labels in a batch: the second of two entries, or what is under a usual name; None if neither."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABEL_NAMES if name in batch), None)
    return None


def _integer_labels(labels: Any) -> Tensor | None:
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.to("cpu", torch.int64)


def _label_column(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        column = _label_column(dataset.dataset)
        return None if column is None else torch.as_tensor(column)[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "column_names"):  # Hugging Face: reads the column alone, decodes no image
        name = next((name for name in _LABEL_NAMES if name in dataset.column_names), None)
        return None if name is None else dataset.select_columns([name])[:][name]
    return next((getattr(dataset, name) for name in _LABEL_NAMES if hasattr(dataset, name)), None)


def _as_tensor(leaf: Any) -> Any:
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype != object else leaf


def stack_examples(examples: list[Any]) -> Batch:
    """torch's `default_collate`; Pillow images become uint8 tensors `[C, H, W]` first.

    Raises:
        UsageError: examples that do not stack into tensors, for instance images of different sizes.
    """
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None:
        examples = tree_map(lambda leaf: image_tensor(leaf) if isinstance(leaf, pillow.Image) else leaf, examples)
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"examples do not stack into a batch ({reason}); give all the same shape") from error


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Labelled images as loaded: batches are `(x uint8 [B, C, H, W], y int64 [B])`."""

    train: Source
    """Training images."""
    test: Source | None
    """Test images; None where the data set has no such split."""
    outputs: int
    """The number of classes."""
    class_names: tuple[str, ...]
    """The name of each class, or its number as a string where the data set names none."""


def load_npz(path: str | Path, *, size: int | None = None, channels: int | None = None) -> ImageData:
    """Images from an `.npz` file, held in memory as uint8.

    The file has `x_train` uint8 `[N, H, W, C]` or `[N, H, W]`, `y_train` integer `[N]`, `x_test`, `y_test`
    likewise and, if it likes, `class_names` (one string per class). Nothing is unpickled. `size` and `channels`
    are those of `prepare_images`.

    Raises:
        UsageError: a file that is missing or not of this form; says which array and why.
    """
    arrays = _read_npz(Path(path))
    names = arrays.get("class_names")
    train_labels = _checked_labels(path, "y_train", arrays)
    outputs = int(train_labels.max()) + 1 if names is None else len(names)
    sources = {}
    for split in ("train", "test"):
        x, y = _checked_images(path, f"x_{split}", arrays), _checked_labels(path, f"y_{split}", arrays)
        if len(x) != len(y):
            raise UsageError(f"{path}: x_{split} has {len(x)} images but y_{split} {len(y)} labels; give one each")
        if not 0 <= int(y.min()) <= int(y.max()) < outputs:
            known = "y_train" if names is None else "class_names"
            raise UsageError(
                f"{path}: labels in y_{split} run from {y.min()} to {y.max()}, but {known} has {outputs} classes;"
                f" use 0 to {outputs - 1}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        images = prepare_images(pixels, size=size, channels=channels)
        sources[split] = ArraySource((images, torch.from_numpy(y)))
    class_names = tuple(map(str, range(outputs) if names is None else names))
    return ImageData(train=sources["train"], test=sources["test"], outputs=outputs, class_names=class_names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the path of an .npz file")
    try:
        # Opened here, for numpy leaves a file that is no archive open.
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
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: not a readable .npz file of plain arrays ({reason}); write it anew") from error


def _checked_images(path: str | Path, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    images = arrays[name]
    if images.dtype != np.uint8:
        raise UsageError(f"{path}: {name} has dtype {images.dtype}; use uint8, 0 to 255")
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise UsageError(f"{path}: {name} has shape {list(images.shape)}; use [N, H, W, C] or [N, H, W]")
    if len(images) == 0:
        raise UsageError(f"{path}: {name} is empty; a split needs at least one image")
    return images if images.ndim == 4 else images[..., None]


def _checked_labels(path: str | Path, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    labels = arrays[name]
    if labels.dtype.kind not in "iu":
        raise UsageError(f"{path}: {name} has dtype {labels.dtype}; use int64 class numbers")
    if labels.ndim != 1:
        raise UsageError(f"{path}: {name} has shape {list(labels.shape)}; use one class number per image")
    if len(labels) == 0:
        raise UsageError(f"{path}: {name} is empty; a split needs at least one image")
    return labels.astype(np.int64)
