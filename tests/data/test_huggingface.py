"""Hugging Face data sets, made here: a saved folder, parquet files, a folder of images. No network."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import hub
from tests.helpers.hub import pictures
from trajshift.data.augmentation import image_task
from trajshift.data.batches import TaskBatches
from trajshift.data.huggingface import hf_source, load_hf
from trajshift.data.loader import PrefetchLoader
from trajshift.data.resize import prepare_images
from trajshift.data.sources import ArraySource, DatasetSource, labels_of
from trajshift.errors import UsageError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    with hub.offline(tmp_path / "cache"):
        yield


def made(
    images: list[np.ndarray], labels: list[Any], feature: Any = None, column: str = "label", picture: str = "image"
) -> Any:
    columns = {picture: [Image.fromarray(image) for image in images], column: labels}
    features = datasets.Features(
        {picture: datasets.Image(), column: feature or datasets.ClassLabel(names=["cat", "dog"])}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def both(images: list[np.ndarray]) -> Any:
    return datasets.DatasetDict({"train": made(images, [0, 1, 1, 0, 1]), "test": made(pictures(2, seed=1), [1, 0])})


def same(source: Any, images: list[np.ndarray], labels: list[int]) -> None:
    x, y = source.fetch(torch.arange(len(source)))
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert y.tolist() == labels
    assert np.array_equal(x.numpy(), np.stack(images).transpose(0, 3, 1, 2))


def test_saved_folder(tmp_path: Path) -> None:
    images = pictures(5)
    both(images).save_to_disk(tmp_path / "saved")
    data = load_hf(tmp_path / "saved")
    assert isinstance(data.train, ArraySource)
    assert (data.outputs, data.class_names) == (2, ("cat", "dog"))
    same(data.train, images, [0, 1, 1, 0, 1])
    same(data.test, pictures(2, seed=1), [1, 0])
    same(hf_source(tmp_path / "saved", "test"), pictures(2, seed=1), [1, 0])
    made(images, [0, 1, 1, 0, 1]).save_to_disk(tmp_path / "single")
    assert load_hf(tmp_path / "single").test is None


def test_parquet(tmp_path: Path) -> None:
    images = pictures(5)
    for split, part in both(images).items():
        part.to_parquet(tmp_path / f"{split}.parquet")
    same(load_hf(tmp_path / "train.parquet").train, images, [0, 1, 1, 0, 1])
    same(load_hf(str(tmp_path / "tr*.parquet")).train, images, [0, 1, 1, 0, 1])
    data = load_hf(tmp_path)
    same(data.train, images, [0, 1, 1, 0, 1])
    same(data.test, pictures(2, seed=1), [1, 0])


@pytest.mark.parametrize("name", ["a [v2]", "a*", "what?"])
def test_parquet_files_in_folders_with_characters_of_patterns(name: str, tmp_path: Path) -> None:
    images = pictures(5)
    for folder in (name, "a v", "ab", "a 2", "whats"):
        both(images if folder == name else pictures(5, seed=9))["train"].to_parquet(
            tmp_path / folder / "train-1.parquet"
        )
    same(load_hf(tmp_path / name / "train-1.parquet").train, images, [0, 1, 1, 0, 1])
    same(load_hf(str(tmp_path / name / "train-*.parquet")).train, images, [0, 1, 1, 0, 1])
    with pytest.raises(UsageError, match="as a pattern; rename the folder, or name its files"):
        load_hf(tmp_path / name)


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["cat", "dog", "eel"])
    parts = {"train": made(pictures(3), [0, 1, 0], label), "test": made(pictures(3), [0, 2, 2], label)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="split 'test': class 'eel' has 2 test images but no training image"):
        load_hf(tmp_path / "saved")


@pytest.mark.parametrize("layout", ["{split}/{name}", "{name}"])
def test_folder_of_images(layout: str, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("validation", 1))[: 1 + layout.count("split")]:
        for number, image in enumerate(pictures(4, seed=seed)):
            folder = tmp_path / layout.format(split=split, name="ab"[number % 2])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    data = load_hf(tmp_path, size=3)
    assert data.class_names == ("a", "b")
    x, y = data.train.fetch(torch.arange(4))
    expected = {
        prepare_images(torch.from_numpy(image).permute(2, 0, 1)[None], size=3).numpy().tobytes(): number % 2
        for number, image in enumerate(pictures(4))
    }
    assert {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)} == expected
    assert (data.test is not None) == ("split" in layout)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_large_sets_are_decoded_when_fetched(tmp_path: Path) -> None:
    images = pictures(5)
    both(images).save_to_disk(tmp_path / "saved")
    data = load_hf(tmp_path / "saved", memory_bytes=5 * 108 - 1)
    assert isinstance(data.train, DatasetSource)
    assert isinstance(data.test, ArraySource)
    same(data.train, images, [0, 1, 1, 0, 1])
    labels = labels_of(data.train)
    assert labels is not None
    assert labels.tolist() == [0, 1, 1, 0, 1]
    small = load_hf(tmp_path / "saved")
    tasks = [image_task("a", source.train, outputs=2, crop_padding=1) for source in (data, small)]
    streamed, held = (TaskBatches(task, seed=0, batch_size=3) for task in tasks)
    stream = PrefetchLoader({"a": streamed}, 1)
    for step in range(4):
        assert torch.equal(streamed.train(step)[0], held.train(step)[0])
    stream.close()


def test_grey_and_coloured_images(tmp_path: Path) -> None:
    grey = pictures(3, (6, 6))
    made(grey, [0, 1, 0]).save_to_disk(tmp_path / "grey")
    same(load_hf(tmp_path / "grey").train, [image[..., None] for image in grey], [0, 1, 0])
    same(load_hf(tmp_path / "grey", channels=3).train, [np.stack([image] * 3, -1) for image in grey], [0, 1, 0])
    made([*grey[:2], *pictures(1)], [0, 1, 0]).save_to_disk(tmp_path / "mixed")
    with pytest.raises(UsageError, match=r"image 2 has shape \[3, 6, 6\] but the first \[1, 6, 6\]"):
        load_hf(tmp_path / "mixed")
    assert load_hf(tmp_path / "mixed", channels=3).train.fetch(torch.arange(3))[0].shape == (3, 3, 6, 6)


def test_images_of_different_size_need_a_size(tmp_path: Path) -> None:
    made([*pictures(1), *pictures(1, (8, 7, 3))], [0, 1]).save_to_disk(tmp_path / "a")
    with pytest.raises(UsageError, match=r"image 1 has shape \[3, 8, 7\] but the first \[3, 6, 6\]; set size"):
        load_hf(tmp_path / "a")
    assert load_hf(tmp_path / "a", size=5).train.fetch(torch.arange(2))[0].shape == (2, 3, 5, 5)


def test_labels_by_name_and_by_number(tmp_path: Path) -> None:
    images = pictures(3)
    made(images, ["pear", "apple", "pear"], datasets.Value("string")).save_to_disk(tmp_path / "names")
    data = load_hf(tmp_path / "names")
    assert data.class_names == ("apple", "pear")
    same(data.train, images, [1, 0, 1])
    made(images, [2, 0, 1], datasets.Value("int64"), column="kind").save_to_disk(tmp_path / "numbers")
    same(load_hf(tmp_path / "numbers", label="kind").train, images, [2, 0, 1])
    with pytest.raises(UsageError, match="no columns of labels; set label to one of image, kind"):
        load_hf(tmp_path / "numbers")
    parts = {"train": made(images, [1, 0, 1]), "test": made(images, [1, -1, 0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UsageError, match="split 'test': label -1 of image 1 is not one of the 2 training classes"):
        load_hf(tmp_path / "unlabelled")
    words = datasets.Value("string")
    parts = {"train": made(images, ["a", "b", "b"], words), "test": made(images, ["a", "c", "b"], words)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "unseen")
    with pytest.raises(UsageError, match="label 'c' of image 1 is not one of the 2 training classes"):
        load_hf(tmp_path / "unseen")
    made(images, [0.5, 1.5, 2.5], datasets.Value("float64")).save_to_disk(tmp_path / "floats")
    with pytest.raises(UsageError, match="contains no class names or numbers"):
        load_hf(tmp_path / "floats")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_labels_of_a_test_split_mean_the_training_classes(kind: str, tmp_path: Path) -> None:
    def load(names: list[str], labels: list[int]) -> Any:
        folder = tmp_path / "-".join(names)
        label = datasets.ClassLabel(names=names)
        train = datasets.ClassLabel(names=["cat", "dog", "eel"])
        parts = {"train": made(pictures(3), [0, 1, 2], train), "test": made(pictures(3, seed=1), labels, label)}
        if kind == "saved":
            datasets.DatasetDict(parts).save_to_disk(folder)
        else:
            for split, part in parts.items():
                part.to_parquet(folder / f"{split}.parquet")
        return load_hf(folder)

    data = load(["dog", "eel"], [0, 1, 0])
    assert data.class_names == ("cat", "dog", "eel")
    same(data.train, pictures(3), [0, 1, 2])
    same(data.test, pictures(3, seed=1), [1, 2, 1])
    same(load(["eel", "dog", "cat"], [0, 1, 2]).test, pictures(3, seed=1), [2, 1, 0])
    same(load(["dog", "fox", "eel"], [0, 2, 0]).test, pictures(3, seed=1), [1, 2, 1])  # a name without an image
    with pytest.raises(UsageError, match="split 'test': class 'fox' of column 'label' is not one of the 3 training"):
        load(["cat", "fox"], [0, 1, 0])


def test_names_in_training_match_numbered_names_in_the_test(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["cat", "dog"])
    parts = {
        "train": made(pictures(2), ["dog", "cat"], datasets.Value("string")),
        "test": made(pictures(2, seed=1), [0, 1], label),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load_hf(tmp_path / "saved")
    assert data.class_names == ("cat", "dog")
    same(data.train, pictures(2), [1, 0])
    same(data.test, pictures(2, seed=1), [0, 1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label": "image"}, "split 'train': column 'image' contains no class names or numbers; set label"),
        ({"label": "pair"}, "split 'train': column 'pair' contains no class names or numbers; set label"),
        ({"image": "pair"}, "split 'train': column 'pair' contains no images; set image"),
        ({"image": "label"}, "split 'train': column 'label' contains no images; set image"),
        ({"size": 3_000_000}, "images were asked for at size 3000000; use 1 to 4096 pixels"),
        ({"image": "deep"}, "split 'train': image 0: an image has Pillow mode 'I;16', more than 8 bits"),
    ],
)
def test_columns_of_another_kind_are_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    split = made(pictures(2), [0, 1]).add_column("pair", [[1, 2], [3, 4]])
    deep = datasets.Dataset.from_dict(
        {"deep": [Image.fromarray(np.full((6, 6), 999, dtype=np.uint16))] * 2},
        features=datasets.Features({"deep": datasets.Image()}),
    )
    datasets.concatenate_datasets([split, deep], axis=1).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=re.escape(sentence)):
        load_hf(tmp_path / "saved", **{"image": "image", "label": "label", **options})


def test_an_image_far_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made([*pictures(1), *pictures(1, (9, 9, 3))], [0, 1]).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UsageError, match=r"split 'train': image 1 is broken \(Image size \(81 pixels\) exceeds limit"):
        load_hf(tmp_path / "saved", size=6)


def test_a_broken_image_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pictures(1)[0]).save(tmp_path / "train" / name / "one.png")
    broken = tmp_path / "train" / "dog" / "one.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UsageError, match=rf"split 'train': image 1 is broken \({re.escape(str(broken))}: .*\); repair"):
        load_hf(tmp_path, test=None)


def test_why_files_cannot_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        made(pictures(50, (20, 20, 3)), [0] * 50).to_parquet(tmp_path / "data" / f"train-{number}.parquet")
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match=r"Not a directory.*; the library keeps its copy in the folder that HF_HOME"):
        load_hf(tmp_path / "data", test=None)
    monkeypatch.undo()
    broken = tmp_path / "data" / "train-1.parquet"
    content = broken.read_bytes()
    broken.write_bytes(content[:100] + b"x" * 4000 + content[4100:])
    with pytest.raises(UsageError, match=re.escape(f"; repair {broken}")):
        load_hf(tmp_path / "data", test=None)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    both(pictures(5)).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="no split 'tset'; did you mean 'test'"):
        load_hf(tmp_path / "saved", test="tset")
    with pytest.raises(UsageError, match="no column 'picture'; set image to one of image"):
        load_hf(tmp_path / "saved", image="picture")
    for absent in (tmp_path / "absent", str(tmp_path / "*.parquet"), "./absent"):
        with pytest.raises(UsageError, match="no such file or folder"):
            load_hf(absent)
    with pytest.raises(UsageError, match="nobody/nothing cannot be opened"):
        load_hf("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty cannot be opened"):
        load_hf(tmp_path / "empty")
    made([], []).to_parquet(tmp_path / "half" / "test.parquet")
    made(pictures(1), [0]).to_parquet(tmp_path / "half" / "train.parquet")
    with pytest.raises(UsageError, match=r"split 'test' is empty|\"test\" corresponds to no data"):
        load_hf(tmp_path / "half")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'trajshift\[data\]'"):
        load_hf("ylecun/mnist")
