"""The built-in digits tasks."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import trajshift.data
from trajshift.data.batches import TaskBatches
from trajshift.data.digits import digits_targets, digits_task, digits_tasks, load_digits
from trajshift.data.npz import load_npz
from trajshift.data.resize import prepare_images
from trajshift.data.sources import ImageData
from trajshift.errors import UsageError

FILE = Path(trajshift.data.__file__).with_name("digits.npz")


def whole(name: str, size: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images and labels of a task by split, the images back at 8 pixels."""
    data: ImageData = load_digits(name, size=size)
    assert data.test is not None
    splits = {"train": data.train, "test": data.test}
    fetched = {split: source.fetch(torch.arange(len(source))) for split, source in splits.items()}
    return {split: x for split, (x, _) in fetched.items()}, {split: y for split, (_, y) in fetched.items()}


@cache
def originals(name: str, split: str) -> set[bytes]:
    """The scans behind a task, whatever it did to them: the least of the 16 forms of each image."""
    images = whole(name)[0][split]
    turned = [torch.rot90(image, turn, (-2, -1)) for image in (images, 255 - images) for turn in range(4)]
    forms = [[image.tobytes() for image in form.numpy()] for one in turned for form in (one, one.flip(-1))]
    return {min(same) for same in zip(*forms, strict=True)}


def test_the_file_holds_all_scans_once() -> None:
    data = np.load(FILE, allow_pickle=False)
    x, y = (np.concatenate([data[f"{kind}_{split}"] for split in ("train", "test")]) for kind in "xy")
    assert x.shape == (1797, 8, 8)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert set(np.unique(x)) == {round(level * 255 / 16) for level in range(17)}
    assert len(np.unique(x.reshape(1797, -1), axis=0)) == 1797
    assert load_npz(FILE).outputs == 10


def test_sources_and_targets_share_no_image() -> None:
    sources = {name: originals(name, "train") | originals(name, "test") for name in digits_tasks()}
    targets = {name: (originals(name, "train"), originals(name, "test")) for name in digits_targets()}
    seen_by_sources = set().union(*sources.values())
    assert len(seen_by_sources) == 178 + 182 + 177 + 183 + 181 + 182
    for train, test in targets.values():
        assert not train & test
        assert not seen_by_sources & (train | test)
    # Nor does a source train on what another tests on.
    for one, other in combinations(sources, 2):
        assert not originals(one, "train") & originals(other, "test")
        assert not originals(one, "test") & originals(other, "train")


def test_tasks_differ_and_are_complete() -> None:
    sources, targets = digits_tasks(), digits_targets()
    assert len(sources) >= 6
    assert len(targets) >= 2
    assert {task.outputs for task in sources.values()} == {2, 3, 4, 6}
    assert {task.input_shape for task in sources.values()} == {(1, size, size) for size in (8, 12, 16)}
    for name, task in {**sources, **targets}.items():
        assert task.name == name
        x, y = next(TaskBatches(task, seed=0, batch_size=32).test(5000))
        assert tuple(x.shape[1:]) == task.input_shape
        assert x.dtype == torch.float32
        assert x.min() >= -1
        assert x.max() <= 1
        assert len(y) == len(task.test)
        for source in (task.train, task.test):
            labels = source.fetch(torch.arange(len(source)))[1]
            assert labels.unique().tolist() == list(range(task.outputs or 0))
        assert len(load_digits(name).class_names) == task.outputs
    assert all(20 <= len(task.train) <= 40 for task in targets.values())


def test_views_and_labels() -> None:
    data = load_npz(FILE)
    x, y = data.train.fetch(torch.arange(len(data.train)))

    def chosen(*digits: int) -> tuple[Tensor, Tensor]:
        mask = torch.tensor([int(label) in digits for label in y])
        return x[mask], y[mask]

    low, digits = chosen(0, 1, 2, 3, 4, 5)
    plain = {name: (images["train"], labels["train"]) for name in digits_tasks() for images, labels in [whole(name)]}
    assert torch.equal(plain["upright"][0], low)
    assert torch.equal(plain["upright"][1], digits)
    assert torch.equal(plain["turned"][0], low.transpose(-2, -1).flip(-2))
    assert torch.equal(plain["upside-down"][0], 255 - low.flip(-1, -2))
    assert torch.equal(plain["mirrored"][0], low.flip(-1))
    assert torch.equal(plain["parity"][1], digits % 2)
    some, _ = chosen(2, 3, 4, 5)
    assert torch.equal(plain["which-side"][0], 255 - torch.cat([some, some.flip(-1)]))
    assert torch.equal(plain["which-side"][1], torch.arange(2).repeat_interleave(len(some)))
    quarter, view = plain["which-turn"][0].chunk(4)[3], plain["which-turn"][1]
    assert torch.equal(quarter, some.transpose(-2, -1).flip(-1))
    assert torch.equal(view, torch.arange(4).repeat_interleave(len(some)))
    images, labels = whole("digit-and-side")
    assert load_digits("digit-and-side").class_names[3] == "7 mirrored"
    marked = images["train"][labels["train"] == 3].flip(-1)
    sevens = torch.cat([x[y == 7], data.test.fetch(torch.arange(355))[0]]) if data.test else x
    assert all((sevens == image).flatten(1).all(1).any() for image in marked)


def test_size_and_channels_and_names() -> None:
    own = load_digits("upright").train.fetch(torch.arange(3))[0]
    raw = whole("upright")[0]["train"][:3]
    assert torch.equal(own, prepare_images(raw, size=12))
    assert digits_task("upright", size=10, channels=3).input_shape == (3, 10, 10)
    assert list(digits_tasks("parity", "upright")) == ["parity", "upright"]
    with pytest.raises(UsageError, match="unknown digits task 'uprigth'; did you mean 'upright'"):
        digits_task("uprigth")
    with pytest.raises(UsageError, match="unknown digits source 'six-to-nine'"):
        digits_tasks("six-to-nine")
    with pytest.raises(UsageError, match="unknown digits target 'upright'"):
        digits_targets("upright")


@pytest.mark.parametrize(("name", "shifted"), [("upright", True), ("upside-down", False)])
def test_white_ink_is_shifted_and_white_paper_is_not(name: str, shifted: bool) -> None:
    task = digits_task(name)
    batches = TaskBatches(task, seed=0, batch_size=64)
    assert task.transform is not None
    still = task.transform(task.train.fetch(batches.indices(0)), None)[0]
    assert torch.equal(batches.train(0)[0], still) != shifted
