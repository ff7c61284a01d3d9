"""Sources that are mapped from a cache's files, and recipes that use them."""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import hub
from trajshift.data import batches as batches_module
from trajshift.data import cache_reader
from trajshift.data.augmentation import image_task
from trajshift.data.batches import TaskBatches
from trajshift.data.cache_reader import check_cache, open_cache
from trajshift.data.cache_writer import prepare_cache
from trajshift.data.loader import PrefetchLoader
from trajshift.data.registry import find
from trajshift.data.sources import ArraySource, DatasetSource, MappedSource, labels_of, subset
from trajshift.errors import UsageError
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.recipe import validate

pytest.importorskip("datasets")
pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    with hub.offline(tmp_path / "cache"):
        yield


def mapped(folder: Path, n: int = 40, pixels: int = 8) -> tuple[MappedSource, ArraySource]:
    """The same random images in a file and in memory."""
    images = np.random.default_rng(3).integers(0, 256, (n, 3, pixels, pixels), dtype=np.uint8)
    labels = torch.arange(n) % 4
    np.save(folder / "images.npy", images)
    return MappedSource(folder / "images.npy", labels), ArraySource((torch.from_numpy(images), labels))


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_mapped_source_gives_what_memory_gives(tmp_path: Path) -> None:
    source, held = mapped(tmp_path)
    numbers = torch.tensor([39, 0, 7, 7])
    assert equal(source.fetch(numbers), held.fetch(numbers))
    assert (len(source), source.bytes) == (40, held.bytes - 40 * 8)
    assert torch.equal(labels_of(source), labels_of(held))  # type: ignore[arg-type]
    part, held_part = subset(source, torch.tensor([5, 9, 2])), subset(held, torch.tensor([5, 9, 2]))
    assert isinstance(part, MappedSource)
    assert equal(part.fetch(torch.tensor([2, 0])), held_part.fetch(torch.tensor([2, 0])))
    twice = subset(part, torch.tensor([1]))
    assert equal(twice.fetch(torch.tensor([0])), held.fetch(torch.tensor([9])))
    source.fetch(numbers)[0].zero_()  # a copy: the file is not written
    assert equal(source.fetch(numbers), held.fetch(numbers))


def test_another_process_gets_the_file_and_not_the_pixels(tmp_path: Path) -> None:
    source, _ = mapped(tmp_path, n=400)
    sent = pickle.dumps(source)
    assert len(sent) < source.bytes / 4
    assert equal(pickle.loads(sent).fetch(torch.arange(9)), source.fetch(torch.arange(9)))


def test_a_cache_larger_than_memory_is_used(tmp_path: Path) -> None:
    count, pixels = 1_000_000, 224
    file = np.lib.format.open_memmap(  # a sparse file of 140 GiB
        tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(count, 3, pixels, pixels)
    )
    file[count - 1] = 7
    del file
    task = image_task("large", MappedSource(tmp_path / "images.npy", torch.arange(count) % 10), outputs=10)
    x, _ = task.train.fetch(torch.tensor([0, count - 1]))
    assert x.flatten(1).amax(1).tolist() == [0, 7]
    assert TaskBatches(task, seed=0, batch_size=2).train(3)[0].shape == (2, 3, pixels, pixels)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_fetch_ahead_what_this_process_would(tmp_path: Path) -> None:
    source, held = mapped(tmp_path)
    tasks = [image_task("a", given, outputs=4, crop_padding=1, flip=True) for given in (source, held)]
    streamed, inline = (TaskBatches(task, seed=1, batch_size=6, heldout=0.2) for task in tasks)
    stream = PrefetchLoader({"a": streamed}, 1)
    assert streamed.raw.streams("train")
    assert not inline.raw.streams("train")
    for step in range(8):
        assert equal(streamed.train(step), inline.train(step))
    stream.close()


def test_small_caches_move_to_an_accelerator_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = mapped(tmp_path)
    task = image_task("a", source, outputs=4)
    raw = TaskBatches(task, seed=0, batch_size=2, device="meta").raw  # a device that holds shapes only
    assert not raw.streams("train")
    moved = raw.source("train")
    assert isinstance(moved, ArraySource)
    assert moved.device.type == "meta"
    assert raw.source("train") is moved
    monkeypatch.setattr(batches_module, "DEVICE_BYTES", source.bytes - 1)
    raw = TaskBatches(task, seed=0, batch_size=2, device="meta").raw
    assert raw.streams("train")
    assert raw.source("train") is source
    assert source.to("cpu") is source


def test_labels_of_a_cache_are_checked_against_the_task(tmp_path: Path) -> None:
    source, _ = mapped(tmp_path)
    with pytest.raises(UsageError, match="labels from 0 to 3 but outputs=3"):
        TaskBatches(image_task("a", source, outputs=3), seed=0, batch_size=2)


# damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of 20 images, made of a local copy and with a size of its own."""
    images = hub.pictures(20, (8, 8, 3))
    hub.repository(tmp_path / "copy", find("cifar10"), images, images[:10])
    return prepare_cache("cifar10", tmp_path, copy=tmp_path / "copy", quiet=True, overrides={"size": 8})


def without(field: str) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {name: value for name, value in manifest.items() if name != field}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *[(without(field), f"has no valid {field}") for field in ("class_names", "images", "entry", "files")],
        (without("differs_from_registry"), "has no valid differs_from_registry"),
        (lambda manifest: {**manifest, "images": {"train": [20, 3, 8, 8]}}, "has no valid images"),
        (
            lambda manifest: {**manifest, "files": {**manifest["files"], "x": {"bytes": 1, "sha256": ""}}},
            "has no valid files",
        ),
        (lambda manifest: {**manifest, "files": {"test-labels.npy": {"bytes": 9}}}, "has no valid files"),
        (lambda manifest: b"\xff\x00\xfe", "decode"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    change: Callable[[dict[str, Any]], Any], sentence: str, cache: Path
) -> None:
    file = cache / "manifest.json"
    changed = change(json.loads(file.read_text()))
    file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    for use in (open_cache, check_cache):
        with pytest.raises(UsageError) as raised:
            use(cache.parent, "cifar10")
        assert re.search(rf"an incomplete cache \(.*{sentence}", str(raised.value))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("train-images.npy", lambda data: b"x" * 128 + data[128:], "is damaged .*"),
        ("test-labels.npy", lambda data: b"x" * 128 + data[128:], "is damaged .*"),
        (
            "train-images.npy",
            lambda data: data.replace(b"(20,", b"(19,"),
            r"contains uint8 \[19, 3, 8, 8\] but should .*",
        ),
        (
            "train-labels.npy",
            lambda data: data.replace(b"(20,", b"(19,"),
            r"contains int64 \[19\] but should contain .*",
        ),
        (
            "train-labels.npy",
            lambda data: data.replace(b"<i8", b"<f8"),
            r"contains float64 \[20\] but should contain .*",
        ),
    ],
)
def test_a_damaged_header_is_refused(file: str, change: Callable[[bytes], bytes], sentence: str, cache: Path) -> None:
    (cache / file).write_bytes(change((cache / file).read_bytes()))
    again = f"trajshift data prepare cifar10 size=8 --root {cache.parent} --from COPY"
    with pytest.raises(UsageError, match=f"{file} {sentence}; remove {cache} and make it again with: {again}$"):
        open_cache(cache.parent, "cifar10")


def test_a_file_that_cannot_be_read_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UsageError, match=r"cannot read \S+train-labels.npy \(Permission denied\)"):
        open_cache(cache.parent, "cifar10")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"cannot read \S+manifest.json \(Permission denied\)"):
        open_cache(cache.parent, "cifar10")
    monkeypatch.setattr(cache_reader, "read_manifest", lambda *_: {})
    with pytest.raises(UsageError, match=r"cannot read \S+train-images.npy \(Permission denied\)"):
        check_cache(cache.parent, "cifar10")


# recipes ----------------------------------------------------------------------------------------------------


def made(tmp_path: Path) -> list[np.ndarray]:
    """Caches of grey and of coloured images in `data`, and a copy of the latter's repository."""
    grey, images = hub.pictures(20, (28, 28)), hub.pictures(30, (32, 32, 3))
    hub.repository(tmp_path / "grey", find("fashion-mnist"), grey, grey[:10])
    hub.repository(tmp_path / "data" / "copy", find("svhn"), images, images[:10])
    prepare_cache("fashion-mnist", tmp_path / "data", copy=tmp_path / "grey", quiet=True)
    prepare_cache("svhn", tmp_path / "data", copy=tmp_path / "data" / "copy", quiet=True)
    return images


def test_recipes_name_caches_and_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = made(tmp_path)
    data = {"root": str(tmp_path / "data"), "channels": 3, "flip": True, "crop_padding": 2}
    tasks = {
        "clothes": {"source": "cache:fashion-mnist"},
        "digits": {"source": "cache:svhn", "train_images": 10},
        "mirrored": {"source": "cache:svhn", "flip": True},
        "streamed": {"source": "hub:svhn", "options": {"from": "copy"}},
    }
    built = build_tasks(validate({"data": data, "tasks": tasks}))
    assert [task.input_shape for task in built.values()] == [(3, 28, 28), *[(3, 32, 32)] * 3]
    assert {task.outputs for task in built.values()} == {10}
    flips = {name: task.transform.flip for name, task in built.items()}  # type: ignore[union-attr]
    assert flips == {"clothes": True, "digits": False, "mirrored": True, "streamed": False}
    assert isinstance(built["digits"].train, MappedSource)
    assert torch.bincount(labels_of(built["digits"].train)).tolist() == [1] * 10  # type: ignore[arg-type]
    x, y = built["streamed"].train.fetch(torch.arange(30))
    assert np.array_equal(x.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert y.tolist() == [number % 10 for number in range(30)]
    assert "warning: task 'streamed': 30 images in split 'train' were found, 73257" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"source": "cache:svhm"}, "tasks.a: unknown data set 'svhm'; did you mean 'svhn'?"),
        ({"source": "hub:imagenet"}, "tasks.a: unknown data set 'imagenet'; did you mean 'imagenet-1k'?"),
        ({"source": "cache:svhn", "size": 16}, "make it with: trajshift data prepare svhn size=16 --root"),
        ({"source": "cache:svhn"}, "no cache of 'svhn' in .*; make it with: trajshift data prepare svhn --root"),
        (
            {"source": "cache:fashion-mnist", "size": 32},
            "size 32 was requested, but the cache of 'fashion-mnist' in .* size=32 --root FOLDER",
        ),
        ({"source": "cache:fashion-mnist", "options": {"label": "x"}}, "cache sources take no options, but 'label'"),
        ({"source": "hub:svhn", "options": {"lable": "x"}}, "'svhn' has no field 'lable' to set; did you mean 'label'"),
        (
            {"source": "hub:svhn", "options": {"from": "gone"}},
            "gone: no such file or folder; give a local copy",
        ),
    ],
)
def test_what_a_recipe_gets_wrong_is_said(task: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    grey = hub.pictures(10, (28, 28))
    hub.repository(tmp_path / "grey", find("fashion-mnist"), grey, grey)
    prepare_cache("fashion-mnist", tmp_path, copy=tmp_path / "grey", quiet=True)
    with pytest.raises(UsageError, match=sentence):
        build_tasks(validate({"data": {"root": str(tmp_path)}, "tasks": {"a": task}}))


def test_a_class_without_examples_is_refused(tmp_path: Path) -> None:
    entry = find("tinyimagenet")
    images = hub.pictures(150, (64, 64, 3))
    hub.repository(tmp_path / "copy", entry, images, images)
    prepare_cache("tinyimagenet", tmp_path, copy=tmp_path / "copy", quiet=True)
    assert open_cache(tmp_path, "tinyimagenet-a").outputs == 100
    with pytest.raises(UsageError, match="class 150 has no example"):
        open_cache(tmp_path, "tinyimagenet-b")


def test_groups_of_imagenet_stream_with_labels_renumbered(tmp_path: Path) -> None:
    entry = find("imagenet-1k")
    images = hub.pictures(1000, (4, 4, 3))
    hub.repository(tmp_path / "copy", entry, images, images)
    source = {"source": "hub:imagenet-group6", "options": {"from": "copy"}, "size": 4}
    task = build_tasks(validate({"data": {"root": str(tmp_path)}, "tasks": {"mammals": source}}))["mammals"]
    members = find("imagenet-group6").members or ()
    x, y = task.train.fetch(torch.arange(len(task.train)))
    assert task.outputs == len(members) == 95
    assert y.tolist() == list(range(95))
    assert np.array_equal(x.numpy(), np.stack([images[number] for number in members]).transpose(0, 3, 1, 2))
    assert not isinstance(task.train, DatasetSource)  # these fit in memory
