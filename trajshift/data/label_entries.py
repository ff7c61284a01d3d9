"""Labels of examples: where a batch has them, in which form, and whether a data set's own list of them is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

LABEL_NAMES = ("y", "label", "labels", "targets")

_CHECKED = 32
"""Examples, evenly spread, that a list of labels is compared with."""
_CHECKED_CLASSES = 64
"""Classes of which the first and the last example are compared too."""
_NARROW = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def label_entry(batch: Any) -> Any:
    """The labels in a batch: the second of two entries, or what is under a usual name; None if neither."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABEL_NAMES if name in batch), None)
    return None


def integer_labels(labels: Any) -> Tensor | None:
    """Class numbers as int64 `[N]` on the CPU; None where labels are anything else."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.to("cpu", torch.int64)


def with_long_labels(batch: Any) -> Any:
    """The batch with integer labels as int64, the only integers besides uint8 that torch's losses take."""
    labels = label_entry(batch)
    if not isinstance(labels, Tensor) or not (
        labels.dtype in _NARROW or (labels.dtype == torch.bool and labels.ndim == 1)
    ):
        return batch
    if isinstance(batch, Mapping):
        name = next(name for name in LABEL_NAMES if name in batch)
        return {**batch, name: labels.long()}
    return type(batch)((batch[0], labels.long())) if type(batch) in (tuple, list) else (batch[0], labels.long())


def plain(leaf: Any) -> Any:
    """An array of numbers as a tensor that can be indexed: native byte order, no negative stride, no rare dtype."""
    if isinstance(leaf, np.unsignedinteger) and leaf.dtype.itemsize > 1:
        return torch.tensor(int(leaf))
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" and leaf.dtype.itemsize <= 16:
        if not leaf.dtype.isnative:
            leaf = leaf.astype(leaf.dtype.newbyteorder("="))
        if any(stride < 0 for stride in leaf.strides):
            leaf = leaf.copy()
        try:
            leaf = torch.from_numpy(leaf)
        except TypeError:  # long doubles
            return leaf
    if isinstance(leaf, Tensor) and leaf.dtype in _WIDER:
        return leaf.to(_WIDER[leaf.dtype])
    return leaf


def listed_labels(dataset: Any, fetch: Callable[[int], Any]) -> Tensor | None:
    """The labels that a data set lists in an attribute or column, int64 `[N]`, if they are those of its examples.

    A wrapper that filters, reorders or renumbers another data set may pass on a list that is not its own, so
    examples are compared with the list; None where no list agrees.

    Args:
        dataset: map-style.
        fetch: the batch of one example.
    """
    fetched: dict[int, list[Tensor]] = {}
    for candidate in _lists(dataset):
        labels = _as_labels(candidate, len(dataset))
        if labels is None:
            continue
        agreeing: set[int] | None = None
        for number in _places_to_check(labels):
            if number not in fetched:
                fetched[number] = _integers(fetch(number))
            same = {place for place, value in enumerate(fetched[number]) if int(value) == int(labels[number])}
            agreeing = same if agreeing is None else agreeing & same
            if not agreeing:
                break
        if agreeing:
            return labels
    return None


def _integers(batch: Any) -> list[Tensor]:
    """What may be the label in the batch of one example: its label entry, or else every single integer in it."""
    entry = label_entry(batch)
    leaves = tree_leaves(batch) if entry is None else [entry]
    return [
        leaf.flatten()[0]
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.numel() == 1 and not leaf.is_floating_point() and not leaf.is_complex()
    ]


def _places_to_check(labels: Tensor) -> list[int]:
    spread = torch.linspace(0, len(labels) - 1, min(_CHECKED, len(labels))).round().long().tolist()
    for kind in labels.unique()[:_CHECKED_CLASSES]:
        places = torch.nonzero(labels == kind).flatten()
        spread += [int(places[0]), int(places[-1])]
    return sorted(set(spread))


def _lists(dataset: Any) -> Iterator[Any]:
    """The lists of labels that a data set offers, unchecked."""
    if isinstance(dataset, Subset):
        for candidate in _lists(dataset.dataset):
            whole = _as_labels(candidate, len(dataset.dataset))  # type: ignore[arg-type]
            if whole is not None:
                yield whole[torch.as_tensor(dataset.indices)]
        return
    for name in LABEL_NAMES:
        try:
            if hasattr(dataset, "column_names"):  # Hugging Face: reads only the column, decodes no image
                if name in dataset.column_names:
                    yield dataset.select_columns([name])[:][name]
            elif hasattr(dataset, name):
                yield getattr(dataset, name)
        except Exception:  # a user's property or transform may raise anything; the examples are read instead
            continue


def _as_labels(candidate: Any, count: int) -> Tensor | None:
    """A list of labels as int64 `[count]`, one column `[count, 1]` included; None for anything else."""
    if isinstance(candidate, Tensor):
        labels = plain(candidate)
    else:
        try:
            labels = plain(np.asarray(candidate))
        except (ValueError, TypeError):
            return None
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    labels = integer_labels(labels)
    return labels if labels is not None and len(labels) == count else None
