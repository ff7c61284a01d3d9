"""Where examples come from: arrays in memory, map-style data sets, files that are mapped into memory.

A source has a length and answers `fetch(indices)` with a batch. That is all the rest of the library asks, and
it is what exact resume and replay rely on: any batch of any step can be fetched again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from trajshift.data.label_entries import integer_labels, label_entry, listed_labels, plain, with_long_labels
from trajshift.data.resize import image_tensor
from trajshift.errors import UsageError, first_line
from trajshift.rng import permutation, seeded_cpu_generators

if TYPE_CHECKING:
    from trajshift.task import Batch

MAX_CLASSES = 1_000_000
"""A larger class number is taken to be an identifier."""


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

    Images are kept as uint8 `[N, C, H, W]`; a task's transform converts them to floating point, batch by batch.

    Raises:
        UsageError: no tensor, a leaf without a first dimension, unequal first dimensions, or no example.
    """

    def __init__(self, tree: Any, *, what: str = "the source") -> None:
        self.tree = with_long_labels(tree_map(plain, tree))
        leaves = tree_leaves(self.tree)
        odd = next((leaf for leaf in leaves if isinstance(leaf, np.ndarray)), None)
        if odd is not None:
            raise UsageError(f"{what} has an array of dtype {odd.dtype}; use numbers, for labels class numbers from 0")
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
            examples = self.dataset.__getitems__(numbers)
        else:
            examples = [self.dataset[number] for number in numbers]
        return with_long_labels(self.collate(examples))

    def to(self, device: torch.device | str) -> DatasetSource:
        """Itself: its examples are made on the CPU."""
        return self


class MappedSource:
    """Images of a cache: batches are `(x uint8 [B, C, H, W], y int64 [B])`, read from the file when fetched.

    Args:
        path: an `.npy` file of uint8 `[N, C, H, W]`.
        labels: int64 `[n]`, the class number of each example.
        rows: int64 `[n]`, the examples' places in the file; None takes all in order.
    """

    def __init__(self, path: Path, labels: Tensor, rows: Tensor | None = None) -> None:
        self.path, self.labels, self.rows = path, labels, rows
        self._pixels = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the file too; the pixels are not sent.
        return MappedSource, (self.path, self.labels, self.rows)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """What the examples would take in memory."""
        return len(self) * int(np.prod(self._pixels.shape[1:]))

    def fetch(self, indices: Tensor) -> Batch:
        """A copy of the examples `indices`, on the CPU."""
        rows = indices if self.rows is None else self.rows[indices]
        return torch.from_numpy(self._pixels[rows.numpy()]), self.labels[indices]

    def select(self, indices: Tensor) -> MappedSource:
        """Only the examples `indices` (int64 `[n]`), in the same file."""
        return MappedSource(self.path, self.labels[indices], indices if self.rows is None else self.rows[indices])

    def to(self, device: torch.device | str) -> MappedSource | ArraySource:
        """The examples in the memory of an accelerator; on the CPU itself."""
        if torch.device(device).type == "cpu":
            return self
        return ArraySource(self.fetch(torch.arange(len(self)))).to(device)


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


def subset(source: Source, indices: Tensor) -> Source:
    """The examples `indices` (int64 `[n]`) of `source`; of an `ArraySource` a copy, of others a view."""
    if isinstance(source, ArraySource):
        return ArraySource(source.fetch(indices))
    if isinstance(source, MappedSource):
        return source.select(indices)
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


def shuffled_by_class(labels: Tensor, key: int) -> tuple[Tensor, ...]:
    """For each class of `labels` (int64 `[N]`) the numbers of its examples, in random order."""
    order = permutation(key, len(labels))
    order = order[labels[order].argsort(stable=True)]
    return order.split(torch.bincount(labels).tolist())


def labels_of(source: Source) -> Tensor | None:
    """The class of every example, int64 `[N]` on the CPU; None where examples carry no integer label.

    Looked for as the second of two entries, or under `y`, `label`, `labels` or `targets`. An attribute or column of
    that name is used if it agrees with examples of the data set; otherwise the data set is read through once.
    """
    if isinstance(source, SubsetSource):
        labels = labels_of(source.source)
        return None if labels is None else labels[source.indices]
    if isinstance(source, ArraySource):
        return integer_labels(label_entry(source.tree))
    if isinstance(source, MappedSource):
        return source.labels
    with seeded_cpu_generators(0):
        if isinstance(source, DatasetSource):
            listed = listed_labels(source.dataset, lambda number: source.fetch(torch.tensor([number])))
            if listed is not None:
                return listed
        entries = [label_entry(source.fetch(torch.tensor([number]))) for number in range(len(source))]
    if not all(isinstance(entry, Tensor) and len(entry) == 1 for entry in entries):
        return None
    return integer_labels(torch.cat(entries))


def stack_examples(examples: list[Any]) -> Batch:
    """torch's `default_collate`; Pillow images become uint8 tensors `[C, H, W]` first.

    Raises:
        UsageError: examples that do not stack into tensors, for instance images of different sizes.
    """
    pillow = sys.modules.get("PIL.Image")

    def tensor(leaf: Any) -> Any:
        return image_tensor(leaf) if pillow is not None and isinstance(leaf, pillow.Image) else plain(leaf)

    try:
        return tree_map(plain, default_collate(tree_map(tensor, examples)))
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"examples do not stack into a batch ({first_line(error)}); give all the same shape"
        ) from error


def numbered_classes(largest: int, what: str) -> tuple[str, ...]:
    """Names of classes that have only numbers: `0` to `largest`.

    Raises:
        UsageError: more classes than is plausible; `what` says whose.
    """
    if largest >= MAX_CLASSES:
        raise UsageError(f"{what} has class number {largest}; use numbers from 0 to the count of classes, or names")
    return tuple(map(str, range(largest + 1)))


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
