"""Digests of data, to notice that it changed: of files and folders without loading them, and of what is in memory.

A digest is `CONTENT` or `CONTENT.TIMES`. Up to FULL_BYTES in FULL_FILES files every byte counts; of more data the
names, the sizes and samples do, and the times of change are kept beside them. Names are relative: a copy elsewhere is
equal.
This module never imports torch before it has tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

FULL_BYTES = 2**30
FULL_FILES = 2_000
SAMPLES = 64
BLOCK = 2**16


def files_digest(path: Path) -> str | None:
    """The digest of a file, or of all files in a folder; None where there is neither, or it cannot be read."""
    try:
        if path.is_file():
            return _digest([(path.name, path)])
        if path.is_dir():
            found = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
            return _digest(sorted((str(file.relative_to(path)), file) for file in found))
    except OSError:
        pass
    return None


def _digest(files: list[tuple[str, Path]]) -> str:
    states = [file.stat() for _, file in files]
    state = sha256()
    for (name, _), about in zip(files, states, strict=True):
        state.update(f"{name}\0{about.st_size}\n".encode(errors="surrogateescape"))
    if len(files) <= FULL_FILES and sum(about.st_size for about in states) <= FULL_BYTES:
        for _, file in files:
            with open(file, "rb") as stream:
                while block := stream.read(2**20):
                    state.update(block)
        return state.hexdigest()[:16]
    for number in _spread(len(files), SAMPLES):
        with open(files[number][1], "rb") as stream:
            size = states[number].st_size
            for place in _spread(max(1, size // BLOCK), SAMPLES):
                stream.seek(place * BLOCK)
                state.update(stream.read(BLOCK))
    times = sha256("\n".join(str(about.st_mtime_ns) for about in states).encode())
    return f"{state.hexdigest()[:16]}.{times.hexdigest()[:8]}"


def _spread(count: int, samples: int) -> Iterable[int]:
    """Up to `samples` numbers below `count`, the first and the last among them."""
    if count <= samples:
        return range(count)
    return sorted({round(sample * (count - 1) / (samples - 1)) for sample in range(samples)})


def examples_digest(train: Any, test: Any) -> str | None:
    """The digest of a task's examples: of arrays in memory all or a sample, of other sources a few examples.

    None where two readings of the same examples differ, so that a change could not be told.
    """
    found = [_source_digest(train), _source_digest(test)]
    if None in found:
        return None
    return sha256("\n".join(map(str, found)).encode()).hexdigest()[:16]


def _source_digest(data: Any) -> str | None:
    if data is None:
        return "none"
    from trajshift.data.sources import ArraySource, as_source

    source = as_source(data)
    if isinstance(source, ArraySource):
        return _tensors_digest(source.tree, len(source))
    readings = {_read(source) for _ in range(2)}
    return readings.pop() if len(readings) == 1 else None


def _read(source: Any) -> str:
    import torch

    from trajshift.rng import seeded_cpu_generators

    state = sha256(str(len(source)).encode())
    with seeded_cpu_generators(0):
        for number in _spread(len(source), SAMPLES // 2):
            state.update(_tensors_digest(source.fetch(torch.tensor([number])), 1).encode())
    return state.hexdigest()


def _tensors_digest(tree: Any, length: int) -> str:
    import torch
    from torch.utils._pytree import tree_leaves

    state = sha256(str(length).encode())
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, torch.Tensor):
            state.update(repr(leaf).encode())
            continue
        state.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        each = leaf.numel() * leaf.element_size()
        if each > FULL_BYTES:
            leaf = leaf[torch.tensor([*_spread(len(leaf), 4096)], device=leaf.device)]
        state.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def changed(old: str | None, new: str | None) -> bool:
    """Whether two digests are of different contents; an unknown one is equal to all."""
    return old is not None and new is not None and old.partition(".")[0] != new.partition(".")[0]


def touched(old: str | None, new: str | None) -> bool:
    """Whether the contents are equal as far as they were read, but the files were written in between."""
    return not changed(old, new) and None not in (old, new) and old != new
