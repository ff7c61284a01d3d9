"""Caches made from local copies of hub repositories. No network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import hub
from tests.helpers.hub import contents, same, small, watch
from trajshift.data import cache_reader, cache_writer
from trajshift.data.cache_reader import MANIFEST, check_cache, open_cache
from trajshift.data.cache_writer import open_entry, overridden, prepare_cache
from trajshift.data.huggingface import image_data
from trajshift.data.registry import DataSet, find
from trajshift.data.resize import prepare_images
from trajshift.data.sources import DatasetSource
from trajshift.errors import UsageError
from trajshift.rng import permutation

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

# Python 3.12 and later warn of any fork once torch has threads; the workers use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    with hub.offline(tmp_path / "cache"):
        yield


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


def test_a_class_never_has_more_than_its_share(tmp_path: Path) -> None:
    entry = replace(find("quickdraw"), classes=3, train_images=21, test_images=6, per_class=(4, 2))
    images = hub.pictures(21, (28, 28))
    labels = [0, *[1] * 10, *[2] * 10]
    for split, count in (("train", 21), ("test", 6)):
        chosen = labels if split == "train" else [0, 0, 1, 1, 2, 2]
        table = hub.table(images[:count], chosen, entry, 3)
        table.to_parquet(str(tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"))
    opened, differing = open_entry(entry, tmp_path / "copy")
    assert torch.bincount(opened.splits["train"].targets).tolist() == [1, 4, 4]
    assert torch.bincount(opened.splits["test"].targets).tolist() == [2, 2, 2]
    assert differing == ["1 classes of fewer than 4 images for train were found, 0 are registered"]


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
    prepare_cache("svhn", tmp_path / "kept", copy=copy, quiet=True)
    monkeypatch.setattr(cache_reader, "find", lambda name: entry)
    open_cache(tmp_path / "kept", "svhn")
    monkeypatch.setattr(cache_reader, "find", lambda name: replace(entry, train_images=22, revision="pinned since"))
    uses: list[Callable[[Path, str], Any]] = [open_cache, check_cache, lambda root, name: prepare_cache(name, root)]
    for use in uses:
        with pytest.raises(UsageError, match=r"23 images in split 'train' were found, 22 are registered.*2026-01-31"):
            use(tmp_path / "kept", "svhn")
    assert overridden(entry, {"label": "digit"}).verified is None
    monkeypatch.setattr(cache_writer, "find", lambda name: replace(entry, test_images=4))
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
        (replace(entry, subset="other"), "has no configuration 'other'; set subset to one of "),
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
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    monkeypatch.setattr(cache_writer, "SYNC_BYTES", 0)
    table = hub.table(images, labels, find("cifar10"), 10).cast_column("img", datasets.Image(decode=False))
    whole = table[:]
    whole["img"][17] = {"bytes": whole["img"][17]["bytes"][:40], "path": None}
    broken = datasets.Dataset.from_dict(whole, features=table.features).cast_column("img", datasets.Image())
    file = copy / "data" / "train-00000-of-00001.parquet"
    good = file.read_bytes()
    broken.to_parquet(str(file))
    with pytest.raises(
        UsageError,
        match=r"split 'train': image 17 is broken \(.*\); repair or drop it, and rerun the same command to resume",
    ):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert not (tmp_path / "cifar10").exists()
    file.write_bytes(good)
    decoded = watch(monkeypatch)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert decoded == [*range(14, 23), *range(5)]
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


def test_damage_is_found(tmp_path: Path) -> None:
    _, _, copy = small("cifar10", tmp_path)
    folder = prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    file = folder / "train-images.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for use in (open_cache, check_cache):
        with pytest.raises(UsageError, match=r"train-images.npy is damaged: its SHA-256"):
            use(tmp_path, "cifar10")
    file.write_bytes(good[:-1])
    with pytest.raises(UsageError, match=f"has {len(good) - 1} bytes but should have {len(good)}"):
        open_cache(tmp_path, "cifar10")
    file.unlink()
    with pytest.raises(UsageError, match=r"an incomplete cache \(.*No such file"):
        open_cache(tmp_path, "cifar10")
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(
        UsageError,
        match=r"an incomplete cache \(manifest.json is not a mapping.*; remove .* and make it again with: traj",
    ):
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


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, copy = small("stl10", tmp_path, n=3)
    datasets.enable_progress_bars()
    capsys.readouterr()
    prepare_cache("stl10", tmp_path, copy=copy, quiet=True)
    assert capsys.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
