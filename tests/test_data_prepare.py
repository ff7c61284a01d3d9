"""Caches made from local copies of hub repositories. No network."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub
import numpy as np
import processes
import pytest
import torch

from trajshift.data import prepare
from trajshift.data.caches import MANIFEST, check_cache, open_cache
from trajshift.data.hashing import permutation
from trajshift.data.huggingface import DecodedImages, image_data
from trajshift.data.preparation import prepare_images
from trajshift.data.prepare import open_entry, overridden, prepare_cache
from trajshift.data.registry import DataSet, find
from trajshift.data.sources import DatasetSource
from trajshift.errors import UsageError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

# Python 3.12 and later warn of any fork once torch has threads; the workers use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    with hub.offline(tmp_path / "cache"):
        yield


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
    images = hub.pictures(n, shape if entry.channels == 3 else shape[:2])
    train, _ = hub.repository(tmp_path / "copy", entry, images, images[:5])
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


# what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar100", "svhn", "fashion-mnist"])
def test_pixels_and_labels_come_back_bit_for_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels, copy = small(name, tmp_path)
    folder = prepare_cache(name, tmp_path / "data", copy=copy)
    assert folder == tmp_path / "data" / name
    data = open_cache(tmp_path / "data", name)
    shown = [image if image.ndim == 3 else image[..., None] for image in images]
    same(data.train, shown, labels)
    same(data.test, shown[:5], labels[:5])
    assert data.class_names == tuple(f"c{number}" for number in range(find(name).classes))
    manifest = check_cache(tmp_path / "data", name)
    assert manifest["images"]["train"] == [23, find(name).channels, find(name).size, find(name).size]
    assert manifest["commit"] is None
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    total = find(name).train_images
    assert warnings[0] == (
        f"warning: {name}: 23 images in split 'train' were found, {total} are registered; the registered figures"
        " are not verified"
    )
    assert manifest["differs_from_registry"] == [line.split(": ")[2].split(";")[0] for line in warnings]
    before = contents(folder)
    prepare_cache(name, tmp_path / "data", copy=tmp_path)  # what is there is left alone
    assert contents(folder) == before


def test_images_of_any_size_are_resized_once(tmp_path: Path) -> None:
    entry = find("stanford-dogs")
    images = [*hub.pictures(2, (120, 90, 3)), *hub.pictures(2, (84, 100, 3)), hub.pictures(1, (97, 100))[0]]
    hub.repository(tmp_path / "copy", entry, images, images[:1])
    prepare_cache("stanford-dogs", tmp_path, copy=tmp_path / "copy", quiet=True)
    x, _ = open_cache(tmp_path, "stanford-dogs").train.fetch(torch.arange(5))
    for number, image in enumerate(images):
        tensor = torch.from_numpy(image if image.ndim == 3 else np.stack([image] * 3, -1)).permute(2, 0, 1)
        assert torch.equal(x[number], prepare_images(tensor[None], size=84)[0]), number


def test_quickdraw_is_subsampled_by_class(tmp_path: Path) -> None:
    entry = replace(find("quickdraw"), classes=3, train_images=30, test_images=9, per_class=(4, 2))
    images = hub.pictures(30, (28, 28))
    hub.repository(tmp_path / "copy", entry, images, images[:9])
    opened, differing = open_entry(entry, tmp_path / "copy")
    assert differing == []
    train = opened.splits["train"]
    assert torch.bincount(train.targets).tolist() == [4, 4, 4]
    assert torch.bincount(opened.splits["test"].targets).tolist() == [2, 2, 2]
    assert torch.equal(train.numbers, train.numbers.sort().values)
    for place, number in enumerate(train.numbers.tolist()):
        assert np.array_equal(train[place][0].numpy()[0], images[number])
        assert train[place][1] == number % 3
    again = open_entry(entry, tmp_path / "copy")[0].splits["train"]
    assert torch.equal(again.numbers, train.numbers)


def test_a_half_uses_the_cache_of_the_whole(tmp_path: Path) -> None:
    entry = find("tinyimagenet")
    images = hub.pictures(200, (64, 64, 3))
    order = permutation(1, 200).tolist()
    table = hub.table(images, order, entry, 200)
    for split in ("train", "valid"):
        table.to_parquet(str(tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"))
    folder = prepare_cache("tinyimagenet-b", tmp_path, copy=tmp_path / "copy", quiet=True)
    assert folder.name == "tinyimagenet"
    for name, first in (("tinyimagenet-a", 0), ("tinyimagenet-b", 100)):
        data = open_cache(tmp_path, name)
        chosen = [place for place, label in enumerate(order) if first <= label < first + 100]
        same(data.train, [images[place] for place in chosen], [order[place] - first for place in chosen])
        assert data.class_names == tuple(f"c{number}" for number in range(first, first + 100))
        assert data.outputs == 100
        streamed = image_data(open_entry(find(name), tmp_path / "copy")[0], memory_bytes=0)
        assert isinstance(streamed.train, DatasetSource)
        same(streamed.train, [images[place] for place in chosen], [order[place] - first for place in chosen])
        assert streamed.class_names == data.class_names


# what is wrong ----------------------------------------------------------------------------------------------


def test_wrong_figures_of_a_verified_entry_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, copy = small("svhn", tmp_path)
    entry = replace(find("svhn"), verified="2026-01-31", train_images=23, test_images=5)
    assert open_entry(entry, copy)[1] == []
    with pytest.raises(UsageError, match=r"svhn: 23 images in split 'train' were found, 22 are registered.*2026-01-31"):
        open_entry(replace(entry, train_images=22), copy)
    assert overridden(entry, {"label": "digit"}).verified is None
    monkeypatch.setattr(prepare, "find", lambda name: replace(entry, test_images=4))
    with pytest.raises(UsageError, match="5 images in split 'test' were found, 4 are registered"):
        prepare_cache("svhn", tmp_path, copy=copy)
    assert not (tmp_path / "svhn").exists()


def test_a_wrong_class_count_is_a_warning_with_both_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = find("cifar10")
    hub.repository(tmp_path / "copy", entry, hub.pictures(20, (32, 32, 3)), hub.pictures(12, (32, 32, 3)), classes=12)
    prepare_cache("cifar10", tmp_path, copy=tmp_path / "copy")
    assert "warning: cifar10: 12 classes were found, 10 are registered" in capsys.readouterr().err
    assert open_cache(tmp_path, "cifar10").outputs == 12


def test_a_missing_column_or_split_is_named(tmp_path: Path) -> None:
    _, _, copy = small("cifar100", tmp_path)
    entry = find("cifar100")
    cases: list[tuple[DataSet, str]] = [
        (replace(entry, label="coarse_label"), "has no column 'coarse_label'; set label to one of fine_label"),
        (replace(entry, image="picture"), "has no column 'picture'; set image to one of img"),
        (replace(entry, test="valid"), "there is no split 'valid'; known: test, train"),
        (replace(entry, subset="other"), "not to be opened as a data set"),
    ]
    for case, sentence in cases:
        with pytest.raises(UsageError, match=re.escape(sentence)):
            open_entry(case, copy)
    with pytest.raises(UsageError, match="absent: no such file or folder; give a local copy of uoft-cs/cifar100"):
        open_entry(entry, tmp_path / "absent")
    with pytest.raises(UsageError, match="cifar100 needs class 100, but there are 100 classes"):
        open_entry(replace(entry, whole="cifar100", members=(3, 100)), copy)


def test_a_broken_image_is_named_and_what_was_decoded_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, copy = small("cifar10", tmp_path)
    undisturbed = contents(prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True))
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2 * 3072)
    monkeypatch.setattr(prepare, "SYNC_BYTES", 0)
    table = hub.table(images, labels, find("cifar10"), 10).cast_column("img", datasets.Image(decode=False))
    whole = table[:]
    whole["img"][17] = {"bytes": whole["img"][17]["bytes"][:40], "path": None}
    broken = datasets.Dataset.from_dict(whole, features=table.features).cast_column("img", datasets.Image())
    file = copy / "data" / "train-00000-of-00001.parquet"
    good = file.read_bytes()
    broken.to_parquet(str(file))
    with pytest.raises(UsageError, match=r"split 'train': image 17 is broken \(.*\); mend or drop the row"):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert not (tmp_path / "cifar10").exists()
    file.write_bytes(good)
    decoded = watch(monkeypatch)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert decoded == [*range(16, 23), *range(5)]
    assert contents(tmp_path / "cifar10") == undisturbed


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"classes": 3}, "has no field 'classes' to set"),
        ({"size": 0}, "size of data set 'cifar10' is 0; use a whole number of pixels above 0"),
        ({"size": -4}, "is -4; use a whole number"),
        ({"size": "big"}, "is 'big'; use a whole number"),
        ({"label": 3}, "label of data set 'cifar10' is 3; use a word"),
    ],
)
def test_fields_that_cannot_be_set(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        overridden(find("cifar10"), values)


def test_a_cache_of_other_size_is_not_taken_for_this_one(tmp_path: Path) -> None:
    _, _, copy = small("cifar10", tmp_path)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True, overrides={"size": 8})
    assert open_cache(tmp_path, "cifar10").train.fetch(torch.arange(1))[0].shape == (1, 3, 8, 8)
    with pytest.raises(UsageError, match="was made with size 8, not 32; remove it, or name another --root"):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)


# dying and going on -----------------------------------------------------------------------------------------


def prepare_and_die(copy: Path, root: Path, writes: int, jobs: int) -> None:
    """Prepares, and is killed when the `writes`-th piece of 4 images has reached the disk."""
    import datasets

    multiprocessing.current_process()._config["daemon"] = False  # it may have children
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    prepare.CHUNK_BYTES, prepare.SYNC_BYTES = 2 * 3072, 4 * 3072
    sync, seen = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal seen
        sync(file)
        seen += os.path.realpath(f"/proc/self/fd/{file}").endswith("-images.npy")
        if seen == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    prepare_cache("cifar10", root, copy=copy, jobs=jobs, quiet=True)


@pytest.mark.parametrize(("writes", "jobs", "torn", "first"), [(3, 1, 0, 8), (4, 2, 5, 11), (7, 1, 0, 19)])
def test_killed_and_resumed_is_the_same_as_undisturbed(
    writes: int, jobs: int, torn: int, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, copy = small("cifar10", tmp_path)
    undisturbed = contents(prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True))
    died = processes.start(prepare_and_die, copy, tmp_path, writes, jobs, log=tmp_path / "log.txt")
    while Path(f"/proc/{died.pid}").exists():  # its workers may live on for a while
        time.sleep(0.01)
    assert not (tmp_path / "cifar10").exists()
    if torn:
        file = tmp_path / "cifar10.part" / "train-images.npy"
        os.truncate(file, file.stat().st_size - torn)
    monkeypatch.setattr(prepare, "SYNC_BYTES", 4 * 3072)
    decoded = watch(monkeypatch)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert decoded[0] == first  # but for the last 4, which may not have reached the disk, what was there is kept
    assert contents(tmp_path / "cifar10") == undisturbed
    assert not (tmp_path / "cifar10.part").exists()
    assert processes.wait(died) == [-signal.SIGKILL], (tmp_path / "log.txt").read_text()


def test_half_done_work_of_another_source_is_not_gone_on_with(tmp_path: Path) -> None:
    images, labels, copy = small("cifar10", tmp_path)
    part = tmp_path / "data" / "cifar10.part"
    part.mkdir(parents=True)
    (part / "train-images.npy").write_bytes(bytes(9 * 3072))
    (part / prepare.PLAN).write_text('{"name": "cifar10"')
    prepare_cache("cifar10", tmp_path / "data", copy=copy, quiet=True)
    same(open_cache(tmp_path / "data", "cifar10").train, images, labels)


def test_two_processes_do_not_write_one_cache(tmp_path: Path) -> None:
    _, _, copy = small("cifar10", tmp_path)
    other = processes.start(hold, tmp_path / "cifar10", log=tmp_path / "log.txt")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UsageError, match="is being written by another process"):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    other.kill()
    processes.wait(other)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)


def hold(folder: Path) -> None:
    with prepare._part(folder):
        folder.with_name("held").touch()
        signal.pause()


def test_more_processes_write_the_same_bytes_and_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, copy = small("cifar10", tmp_path)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2 * 3072)
    one = contents(prepare_cache("cifar10", tmp_path / "one", copy=copy, quiet=True))
    assert capsys.readouterr().err == ""
    assert contents(prepare_cache("cifar10", tmp_path / "two", copy=copy, jobs=2)) == one
    assert re.search(r"cifar10 train: image 23/23, \S+ images/s", capsys.readouterr().err)


def test_damage_is_found(tmp_path: Path) -> None:
    _, _, copy = small("cifar10", tmp_path)
    folder = prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    file = folder / "train-images.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    open_cache(tmp_path, "cifar10")
    with pytest.raises(UsageError, match=r"train-images.npy is damaged: its SHA-256"):
        check_cache(tmp_path, "cifar10")
    file.write_bytes(good[:-1])
    with pytest.raises(UsageError, match=f"has {len(good) - 1} bytes and should have {len(good)}"):
        open_cache(tmp_path, "cifar10")
    file.unlink()
    with pytest.raises(UsageError, match=r"no whole cache \(FileNotFoundError"):
        open_cache(tmp_path, "cifar10")
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(UsageError, match=r"no whole cache \(TypeError"):
        open_cache(tmp_path, "cifar10")
    with pytest.raises(UsageError, match=r"no cache of 'svhn' in .*; make it with: trajshift data prepare svhn --root"):
        open_cache(tmp_path, "svhn")


def test_the_manifest_says_where_it_is_from(tmp_path: Path) -> None:
    _, _, copy = small("stl10", tmp_path, n=3)
    manifest = json.loads((prepare_cache("stl10", tmp_path, copy=copy, quiet=True) / MANIFEST).read_text())
    assert manifest["entry"]["hub"] == "tanganke/stl10"
    assert manifest["entry"]["revision"] == find("stl10").revision
    assert manifest["from_local_copy"] is True
    assert str(tmp_path) not in json.dumps(manifest)
