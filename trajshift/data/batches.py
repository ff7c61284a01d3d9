"""Batches of a task as a pure function of the step.

Examples are visited epoch by epoch without replacement; batches have a constant size and run across epoch
ends. There is no state to save: batch 1,000 can be asked for directly, a round can be replayed, and nothing
depends on other tasks, on processes or on workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import NoneType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trajshift.data.augmentation import ImageTransform
from trajshift.data.label_entries import label_entry
from trajshift.data.sources import ArraySource, MappedSource, Source, as_source
from trajshift.errors import UsageError
from trajshift.losses import check_values
from trajshift.rng import key, permutation, seeded_cpu_generators
from trajshift.rng import seeded as seeded_generators
from trajshift.task import Batch, Task, move, untested

DEVICE_BYTES = 2 * 2**30
"""Sources in memory and caches up to this size (bytes) are copied to the device, larger ones stay where they are."""


class Request(NamedTuple):
    """Names one batch of one task."""

    name: str
    split: str
    """`train`, `heldout` or `test`."""
    step: int
    size: int
    """Examples asked for; the last batch of a test set may be smaller."""


class Fetcher(Protocol):
    """Who fetches raw batches ahead of the step that asks for them: `loader.PrefetchLoader`."""

    def take(self, request: Request) -> Batch:
        """One batch."""
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """These batches, in this order."""
        ...


class RawBatches:
    """The batches of one task before transform and move to the device; all that a loader worker needs.

    With `heldout > 0` that share of the training examples (at least one) is never trained on.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        heldout: float = 0.0,
    ) -> None:
        self.name, self.seed = task.name, seed
        self.batch_size = task.batch_size or batch_size
        # A custom loss may use labels as it likes, for instance -100 for "ignore".
        self._classes = task.outputs if task.kind == "classification" and task.loss is None else None
        # The losses of both kinds take pairs; a transform of the user's may make them.
        self._pairs = task.loss is None and (task.transform is None or isinstance(task.transform, ImageTransform))
        self._kind, self._outputs = (None if task.loss is not None else task.kind), task.outputs
        self._device = torch.device(device)
        self._sources = {"train": self._checked(task.train, "training")}
        if task.test is not None:
            self._sources["test"] = self._checked(task.test, "test")
        self._placed: set[str] = set()
        self._members = self._split(heldout)
        self._epochs: dict[tuple[str, int], Tensor] = {}

    def source(self, split: str) -> Source:
        """The source behind a split; one in memory is put on the device when first asked for."""
        side = _side(split)
        if side not in self._sources:
            raise untested(self.name)
        source = self._sources[side]
        if side not in self._placed:
            self._placed.add(side)
            if lies_on(self._device, source):
                self._sources[side] = source.to(self._device)
        return self._sources[side]

    def streams(self, split: str) -> bool:
        """Whether the split exists and is made example by example, hence worth fetching ahead."""
        source = self._sources.get(_side(split))
        return not (isinstance(source, (ArraySource, NoneType)) or lies_on(self._device, source))

    def size(self, split: str) -> int:
        """The number of examples of a split."""
        members = self._members.get(split)
        return len(self.source(split)) if members is None else len(members)

    def indices(self, step: int, split: str, size: int) -> Tensor:
        """Numbers of the examples in batch `step`, int64 `[size]`, into the source of the split."""
        count, position = self.size(split), step * size
        if split == "test":
            return torch.arange(position, min(position + size, count))
        parts = []
        end = position + size
        while position < end:
            epoch, start = divmod(position, count)
            taken = min(count - start, end - position)
            parts.append(self._order(split, epoch, count)[start : start + taken])
            position += taken
        chosen = torch.cat(parts) if len(parts) > 1 else parts[0]
        members = self._members.get(split)
        return chosen if members is None else members[chosen]

    def fetch(self, request: Request) -> Batch:
        """The batch as its source gives it, labels checked.

        Raises:
            UsageError: a class number outside 0 to `outputs` - 1.
        """
        source = self.source(request.split)
        indices = self.indices(request.step, request.split, request.size)
        if isinstance(source, (ArraySource, MappedSource)):
            return source.fetch(indices)
        with seeded_cpu_generators(key(self.seed, self.name, "fetch", request.split, request.step)):
            batch = source.fetch(indices)
        self._check_labels(batch)
        return batch

    def _checked(self, data: object, what: str) -> Source:
        source = as_source(data, what=f"the {what} set of task {self.name!r}")
        if self._pairs and not isinstance(source, MappedSource):
            self._check_pairs(source, what)
        if isinstance(source, ArraySource):
            self._check_labels(source.tree)
        if isinstance(source, MappedSource):
            self._check_labels((source, source.labels))
        return source

    def _check_pairs(self, source: Source, what: str) -> None:
        """Refuse examples that the loss cannot take apart."""
        if isinstance(source, ArraySource):
            batch = source.tree
        else:
            with seeded_cpu_generators(0):
                batch = source.fetch(torch.tensor([0]))
        if isinstance(batch, Mapping):
            form = f"mappings with {', '.join(map(repr, batch)) or 'nothing'}"
        elif isinstance(batch, (tuple, list)) and len(batch) != 2:
            form = f"{len(batch)} entries each"
        else:
            return
        raise UsageError(
            f"the {what} set of task {self.name!r} has examples that are {form}; give pairs (x, y), or give the task a"
            " loss of its own, called as loss(module, batch)"
        )

    def _check_labels(self, batch: Batch) -> None:
        labels = label_entry(batch)
        if self._kind is not None and isinstance(labels, Tensor):
            wrong = check_values(self._kind, self._outputs, labels)
            if wrong is not None:
                raise UsageError(f"task {self.name!r} has {wrong}")
        if self._classes is None or not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
            return
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= self._classes:
            raise UsageError(
                f"task {self.name!r} has labels from {low} to {high} but outputs={self._classes}; use class numbers"
                f" 0 to {self._classes - 1}"
            )

    def _split(self, heldout: float) -> dict[str, Tensor | None]:
        if not 0.0 <= heldout < 1.0:
            raise UsageError(f"heldout is {heldout}; use a share of the training examples from 0 to below 1")
        if heldout == 0.0:
            return {"train": None}
        source = self.source("train")
        kept = len(source) - max(1, round(heldout * len(source)))
        if kept < 1:
            raise UsageError(
                f"task {self.name!r} has {len(source)} training examples: holding out {heldout:g} of them leaves none"
                " to train on; lower heldout or give more examples"
            )
        order = permutation(key(self.seed, self.name, "split"), len(source)).to(self._index_device)
        return {"train": order[:kept], "heldout": order[kept:]}

    @property
    def _index_device(self) -> torch.device:
        source = self.source("train")
        return source.device if isinstance(source, ArraySource) else torch.device("cpu")

    def _order(self, split: str, epoch: int, count: int) -> Tensor:
        if split not in self._members:
            raise UsageError(f"task {self.name!r} holds no examples out; set heldout above 0")
        if (split, epoch) not in self._epochs:
            mine = [cached for cached in self._epochs if cached[0] == split]
            if len(mine) == 2:
                del self._epochs[mine[0]]
            order = permutation(key(self.seed, self.name, split, epoch), count, device=self._index_device)
            self._epochs[split, epoch] = order
        return self._epochs[split, epoch]


def lies_on(device: torch.device, source: Source) -> bool:
    """Whether a source is copied to the device whole: small ones in memory, and on accelerators small caches."""
    if isinstance(source, MappedSource) and device.type == "cpu":
        return False
    return isinstance(source, (ArraySource, MappedSource)) and source.bytes <= DEVICE_BYTES


def _side(split: str) -> str:
    return "test" if split == "test" else "train"


class TaskBatches:
    """The batches of one task on its device, transformed.

    Args:
        task: its `batch_size`, if set, overrides the argument.
        seed: with the task's name it decides every draw.
        batch_size: examples per training batch.
        device: where batches are delivered; sources in memory of up to `DEVICE_BYTES` move there whole.
        heldout: share of the training examples kept out of training for `heldout(step)`.
        dtype: what floating entries of a batch are converted to; None leaves them.

    Raises:
        UsageError: no examples, labels outside the task's classes, or a split that leaves none to train on.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        heldout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (task.batch_size or batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size}; use at least 1")
        self.raw = RawBatches(task, seed=seed, batch_size=batch_size, device=device, heldout=heldout)
        self.name, self.seed, self.batch_size = task.name, seed, self.raw.batch_size
        self.device, self.dtype = torch.device(device), dtype
        self.stream: Fetcher | None = None
        self._transform = task.transform

    @property
    def size(self) -> int:
        """The number of examples trained on, held-out ones not counted."""
        return self.raw.size("train")

    def indices(self, step: int, split: str = "train") -> Tensor:
        """Numbers of the examples in batch `step` (0 first), int64 `[batch_size]`, into the task's source."""
        return self.raw.indices(step, split, self.batch_size)

    def train(self, step: int, *, seeded: bool = True) -> Batch:
        """Training batch number `step` (0 first), augmented.

        `seeded` False leaves the global generators to the caller: for engines that run tasks at the same time.
        """
        return self._ready("train", step, seeded)

    def heldout(self, step: int) -> Batch:
        """Batch number `step` of the held-out examples, augmented as training batches are.

        Raises:
            UsageError: nothing was held out.
        """
        return self._ready("heldout", step)

    def test(self, batch_size: int = 500) -> Iterator[Batch]:
        """The whole test set once, in order and without random draws; the last batch may be smaller.

        Raises:
            UsageError: the task has no test source.
        """
        if batch_size < 1:
            raise UsageError(f"the test batch size is {batch_size}; use at least 1")
        count = -(-self.raw.size("test") // batch_size)
        requests = [Request(self.name, "test", step, batch_size) for step in range(count)]
        fetched = map(self.raw.fetch, requests) if self.stream is None else self.stream.run(requests)
        return (self._finish(batch, None, self.augmentation_key("test", step)) for step, batch in enumerate(fetched))

    def _ready(self, split: str, step: int, seeded: bool = True) -> Batch:
        request = Request(self.name, split, step, self.batch_size)
        batch = self.raw.fetch(request) if self.stream is None else self.stream.take(request)
        draw = self.augmentation_key(split, step)
        return self._finish(batch, draw, draw if seeded else None)

    def augmentation_key(self, split: str, step: int) -> int:
        """The draw behind the augmentation of a batch."""
        return key(self.seed, self.name, "augment", split, step)

    def _finish(self, batch: Batch, draw: int | None, seed: int | None = None) -> Batch:
        batch = move(batch, self.device)
        if self._transform is not None:
            # A transform of ours draws by its key alone; a user's may draw from torch, numpy or random.
            own = seed is None or getattr(self._transform, "draws_by_key", False)
            with nullcontext() if own else seeded_generators(seed or 0, self.device):
                batch = self._transform(batch, draw)
        return self.cast(batch)

    def cast(self, batch: Batch) -> Batch:
        """The batch, its floating entries in `dtype`."""
        return batch if self.dtype is None else tree_map(self._cast, batch)

    def _cast(self, leaf: object) -> object:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
