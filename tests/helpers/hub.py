"""Local copies of hub repositories as they are downloaded: parquet files with the registered splits and columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trajshift.data.decoded_images import DecodedImages
from trajshift.data.registry import DataSet, find


@contextmanager
def offline(cache: Path) -> Iterator[None]:
    """`datasets` without a network, its copies below `cache`."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.enable_progress_bars()


def pictures(n: int, shape: tuple[int, ...] = (6, 6, 3), seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8))


def table(images: list[Any], labels: list[int], entry: DataSet, classes: int) -> Any:
    import datasets
    from PIL import Image

    encoded = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    names = [f"c{number}" for number in range(classes)]
    features = {entry.image: datasets.Image(), entry.label: datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict({entry.image: encoded, entry.label: labels}, features=datasets.Features(features))


def repository(
    folder: Path, entry: DataSet, train: list[Any], test: list[Any], classes: int | None = None
) -> tuple[list[int], list[int]]:
    """Writes the files of both splits below `folder`; image i has label i modulo the classes, which are returned."""
    count = classes or entry.classes
    labels = []
    for split, images in ((entry.train, train), (entry.test, test)):
        labels.append([number % count for number in range(len(images))])
        place = folder / (entry.subset or "data")
        table(images, labels[-1], entry, count).to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    if entry.subset is not None:
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {entry.subset}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {entry.subset}/{s}-*\n" for s in (entry.train, entry.test))
            + "- config_name: other\n  data_files:\n  - split: train\n    path: other/train-*\n---\n"
        )
    return labels[0], labels[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def same(source: Any, images: list[np.ndarray], labels: list[int]) -> None:
    x, y = source.fetch(torch.arange(len(source)))
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert y.tolist() == labels
    assert np.array_equal(x.numpy(), np.stack(images).transpose(0, 3, 1, 2))


def small(name: str, tmp_path: Path, n: int = 23) -> tuple[list[np.ndarray], list[int], Path]:
    """A copy of a repository at the registered size, its training images and labels."""
    entry = find(name)
    shape = (entry.size, entry.size, entry.channels)
    images = pictures(n, shape if entry.channels == 3 else shape[:2])
    train, _ = repository(tmp_path / "copy", entry, images, images[:5])
    return images, train, tmp_path / "copy"


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the numbers of the images that are decoded."""
    decoded: list[int] = []
    getitem = DecodedImages.__getitem__

    def watched(images: DecodedImages, place: int) -> Any:
        decoded.append(place)
        return getitem(images, place)

    monkeypatch.setattr(DecodedImages, "__getitem__", watched)
    return decoded
