"""Sources, subsets, preparation and `.npz` files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from trajshift.data.npz import load_npz
from trajshift.data.resize import prepare_images
from trajshift.data.sources import (
    ArraySource,
    DatasetSource,
    Source,
    as_source,
    class_balanced_subset,
    labels_of,
    subset,
)
from trajshift.errors import UsageError
from trajshift.rng import seeded_cpu_generators


class Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Six examples; counts how often one is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return torch.full((2,), float(index)), index % 3


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


# -- sources ---------------------------------------------------------------------------------------------------


def test_arrays_are_fetched_in_the_order_asked_for() -> None:
    x, y = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8), torch.arange(9)
    indices = torch.tensor([8, 0, 0, 5])
    source = as_source((x, y))
    assert isinstance(source, ArraySource)
    assert isinstance(source, Source)
    assert len(source) == 9
    fetched = source.fetch(indices)
    assert isinstance(fetched, tuple)
    assert fetched[0].dtype == torch.uint8
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(fetched[0][row], x[index])
        assert fetched[1][row] == y[index]
    fetched[0].zero_()
    assert x.any()  # a batch is a copy


def test_trees_of_arrays() -> None:
    tree = {"ids": np.arange(12).reshape(4, 3), "more": {"mask": torch.ones(4, 3)}, "y": torch.arange(4)}
    batch = as_source(tree).fetch(torch.tensor([2, 1]))
    assert batch["ids"].tolist() == [[6, 7, 8], [3, 4, 5]]
    assert batch["more"]["mask"].shape == (2, 3)
    batch = as_source(TensorDataset(torch.arange(4), torch.ones(4))).fetch(torch.tensor([3]))
    assert [leaf.tolist() for leaf in batch] == [[3], [1.0]]
    assert as_source(torch.arange(5)).fetch(torch.tensor([4])).tolist() == [4]


def test_sources_stay_as_they_are() -> None:
    source = ArraySource(torch.arange(3))
    assert as_source(source) is source
    assert source.to("cpu").tree.data_ptr() == source.tree.data_ptr()
    assert source.bytes == 24


@pytest.mark.parametrize("data", [Pairs(), [(torch.full((2,), float(i)), i % 3) for i in range(6)]])
def test_map_style_data_sets(data: Any) -> None:
    source = as_source(data)
    assert isinstance(source, DatasetSource)
    x, y = source.fetch(torch.tensor([5, 1]))
    assert x.tolist() == [[5.0, 5.0], [1.0, 1.0]]
    assert y.tolist() == [2, 1]


def test_batched_access_is_used() -> None:
    class Batched(Pairs):
        def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
            assert indices == [4, 0]
            return [super(Batched, self).__getitem__(index) for index in indices]

    assert DatasetSource(Batched()).fetch(torch.tensor([4, 0]))[1].tolist() == [1, 0]


@pytest.mark.parametrize("data", [Endless(), iter([1]), object()])
def test_data_without_length_or_index_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="map-style"):
        as_source(data)


@pytest.mark.parametrize("data", [[], (torch.empty(0, 2), torch.empty(0)), TensorDataset(torch.empty(0))])
def test_empty_sources_are_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="the training set of task 'a' has no examples"):
        as_source(data, what="the training set of task 'a'")


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unequal length \[3, 4\]"):
        as_source((torch.ones(3), torch.ones(4)))
    with pytest.raises(UsageError, match="must hold tensors"):
        as_source(("a", "b"))
    with pytest.raises(UsageError, match="must hold tensors"):
        as_source(torch.tensor(1.0))


def test_pillow_images_become_tensors() -> None:
    image = pytest.importorskip("PIL.Image")
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    x, y = as_source([(image.fromarray(array), 0), (image.fromarray(array[..., 0]).convert("RGB"), 1)]).fetch(
        torch.arange(2)
    )
    assert x.dtype == torch.uint8
    assert x[0].tolist() == array.transpose(2, 0, 1).tolist()
    assert y.tolist() == [0, 1]
    with pytest.raises(UsageError, match="more than 8 bits"):
        as_source([image.fromarray(np.ones((2, 2), dtype=np.uint16))]).fetch(torch.arange(1))


def test_examples_that_do_not_stack_are_refused() -> None:
    with pytest.raises(UsageError, match="do not stack"):
        as_source([torch.ones(2), torch.ones(3)]).fetch(torch.arange(2))


def test_seeded_draws_repeat_and_leave_the_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    with seeded_cpu_generators(2**64 - 1):
        first = draw()
    with pytest.raises(ZeroDivisionError), seeded_cpu_generators(2**64 - 1):
        random.seed(1 / 0)
    with seeded_cpu_generators(2**64 - 1):
        assert draw() == first
    with seeded_cpu_generators(5):
        assert draw() != first
    assert draw() == expected


# -- subsets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 10, 17, 25, 40])
def test_class_balanced_subsets(n: int) -> None:
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] * 8 + [7] * 9)
    source = as_source((torch.arange(40), labels))
    chosen = class_balanced_subset(source, n, key=123)
    assert len(set(chosen.tolist())) == n
    counts, available = labels[chosen].bincount(minlength=8), labels.bincount(minlength=8)
    full = counts == available
    # Fill the classes one image at a time, as one would by hand: the counts must be these up to the odd ones.
    spread = counts[~full]
    assert full.all() or spread.max() - spread.min() <= 1
    assert full.all() or counts[full].max() <= spread.max()
    assert torch.equal(class_balanced_subset(source, 40, key=123)[:n], chosen)
    assert n == 40 or not torch.equal(class_balanced_subset(source, n, key=124), chosen)


def test_the_odd_example_goes_to_a_random_class() -> None:
    source = as_source((torch.arange(30), torch.arange(30) % 3))
    odd = [labels_of(subset(source, class_balanced_subset(source, 1, key))) for key in range(60)]
    assert torch.cat([label for label in odd if label is not None]).bincount().min() > 5


def test_asking_for_more_than_all_gives_all() -> None:
    source = as_source((torch.arange(6), torch.arange(6) % 2))
    assert sorted(class_balanced_subset(source, 100, 0).tolist()) == list(range(6))
    with pytest.raises(UsageError, match="subset of 0"):
        class_balanced_subset(source, 0, 0)


def test_regression_sources_give_a_plain_subset() -> None:
    source = as_source((torch.arange(50), torch.randn(50)))
    assert labels_of(source) is None
    assert len(set(class_balanced_subset(source, 20, 0).tolist())) == 20


def test_subsets_of_arrays_and_of_data_sets() -> None:
    indices = torch.tensor([5, 2, 4])
    for data in (Pairs(), (torch.arange(6.0)[:, None].expand(6, 2), torch.arange(6) % 3)):
        part = subset(as_source(data), indices)
        assert len(part) == 3
        x, y = part.fetch(torch.tensor([2, 0]))
        assert x.tolist() == [[4.0, 4.0], [5.0, 5.0]]
        assert y.tolist() == [1, 2]
        labels = labels_of(part.to("cpu"))
        assert labels is not None
        assert labels.tolist() == [2, 2, 1]


def test_labels_are_read_from_an_attribute_where_there_is_one() -> None:
    pairs = Pairs()
    read = labels_of(as_source(pairs))
    assert read is not None
    assert read.tolist() == [0, 1, 2, 0, 1, 2]
    assert pairs.reads == 6
    pairs.targets = [0, 1, 2, 0, 1, 2]  # type: ignore[attr-defined]
    known = labels_of(as_source(Subset(pairs, [5, 0])))
    assert known is not None
    assert known.tolist() == [2, 0]
    by_name = labels_of(as_source({"x": torch.ones(3), "labels": torch.tensor([2, 1, 0])}))
    assert by_name is not None
    assert by_name.tolist() == [2, 1, 0]


class Many(Dataset[tuple[torch.Tensor, int]]):
    """Examples with these labels and attributes, and the number of reads."""

    def __init__(self, truth: list[int], **attributes: Any) -> None:
        self.truth, self.reads = truth, 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return torch.zeros(2), self.truth[index]


TRUTH = [0, 0, 1, 2] * 500


def test_a_right_list_of_labels_is_used_without_reading_all() -> None:
    for listed in (TRUTH, np.array(TRUTH)[:, None], torch.tensor(TRUTH, dtype=torch.int16), np.array(TRUTH, ">i4")):
        data = Many(TRUTH, targets=listed)
        labels = labels_of(as_source(data))
        assert labels is not None
        assert labels.tolist() == TRUTH
        assert data.reads < 50


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": sorted(TRUTH)},  # reordered
        {"targets": [1, 0, 2] * 600 + [0] * 200},
        {"targets": TRUTH[:-1]},  # filtered
        {"targets": [{2: 1}.get(label, label) for label in TRUTH]},  # classes joined
        {"targets": [*TRUTH[:-1], 5]},
        {"labels": ["cat", "dog", "owl"]},
        {"labels": ["cat"] * 2000},
        {"y": np.zeros((2000, 3))},
        {"targets": lambda: TRUTH},
        {"targets": [[0], [1, 2]]},
        {"y": None, "labels": sorted(TRUTH), "targets": TRUTH},
    ],
)
def test_a_wrong_list_of_labels_is_not_believed(attributes: dict[str, Any]) -> None:
    data = Many(TRUTH, **attributes)
    labels = labels_of(as_source(data))
    assert labels is not None
    assert labels.tolist() == TRUTH
    chosen = class_balanced_subset(as_source(data), 9, key=7)
    assert np.bincount([data[int(number)][1] for number in chosen]).tolist() == [3, 3, 3]


def test_a_list_whose_property_fails_is_not_used() -> None:
    class Failing(Many):
        @property
        def targets(self) -> Any:
            raise RuntimeError("not downloaded")

    labels = labels_of(as_source(Failing(TRUTH[:20])))
    assert labels is not None
    assert labels.tolist() == TRUTH[:20]


def test_labels_of_examples_in_another_form_are_compared_too() -> None:
    class Records(Many):
        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return {"image": torch.zeros(2), "fine_label": self.truth[index], "id": index}

    right, wrong = Records(TRUTH, targets=TRUTH), Records(TRUTH, targets=sorted(TRUTH))
    labels = labels_of(as_source(right))
    assert labels is not None
    assert labels.tolist() == TRUTH
    assert labels_of(as_source(wrong)) is None


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint16", "uint32", "uint64", ">i4", ">u2", "bool"])
@pytest.mark.parametrize("form", ["arrays", "examples"])
def test_labels_of_any_integer_type_train(kind: str, form: str) -> None:
    x, truth = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 1, 0, 1, 0])
    labels = truth.astype(kind)
    source = as_source((x, labels) if form == "arrays" else list(zip(x, labels, strict=True)))
    batch = source.fetch(torch.tensor([5, 1]))
    assert batch[1].dtype == torch.int64
    assert batch[1].tolist() == [0, 1]
    torch.nn.functional.cross_entropy(batch[0][:, :2], batch[1])


@pytest.mark.parametrize("kind", ["uint16", "uint32", ">f4", ">i2", "float64"])
def test_arrays_of_any_number_type_and_stride(kind: str) -> None:
    values = np.arange(24).reshape(6, 4).astype(kind)
    for array in (values, values[::-1], values[:, ::-1], values.T):
        y = np.arange(len(array))
        for source in (as_source((array, y)), as_source(list(zip(array, y, strict=True)))):
            x, _ = source.fetch(torch.tensor([2, 0]))
            assert x.tolist() == array[[2, 0]].tolist()


def test_arrays_that_are_no_numbers_are_named() -> None:
    with pytest.raises(UsageError, match="the source has an array of dtype <U3; use numbers, for labels class numbers"):
        as_source((np.zeros((2, 3)), np.array(["cat", "dog"])))


# -- preparation -----------------------------------------------------------------------------------------------


def test_size_and_channels() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert prepare_images(images) is images
    coloured = prepare_images(images, channels=3)
    assert coloured.shape == (3, 3, 8, 8)
    assert all(torch.equal(coloured[:, channel], images[:, 0]) for channel in range(3))
    assert torch.equal(prepare_images(coloured, channels=1), images)
    with pytest.raises(UsageError, match="3 channels, which cannot become 4"):
        prepare_images(coloured, channels=4)
    with pytest.raises(UsageError, match="size 0"):
        prepare_images(images, size=0)


def test_halving_averages_with_the_antialiased_triangle() -> None:
    """At half the size the triangle's weights are 1/8, 3/8, 3/8, 1/8, renormalised at the border."""
    row = torch.tensor([0, 80, 160, 240, 40, 120, 200, 8], dtype=torch.uint8)
    weights = np.array([1, 3, 3, 1]) / 8
    expected = []
    for place in range(4):
        taps = [(2 * place - 1 + k, weight) for k, weight in enumerate(weights) if 0 <= 2 * place - 1 + k < 8]
        total = sum(weight for _, weight in taps)
        expected.append(round(sum(float(row[index]) * weight for index, weight in taps) / total))
    halved = prepare_images(row.expand(1, 1, 8, 8).contiguous(), size=4)
    assert halved[0, 0].tolist() == [expected] * 4


def test_the_middle_is_cut_out_of_an_oblong_image() -> None:
    images = torch.zeros(1, 1, 4, 10, dtype=torch.uint8)
    images[..., 3:7] = 200
    assert prepare_images(images, size=4).tolist() == [[[[200] * 4] * 4]]


def test_resizing_does_not_depend_on_the_chunk() -> None:
    images = torch.randint(0, 256, (1030, 1, 4, 4), dtype=torch.uint8)
    resized = prepare_images(images, size=3)
    assert torch.equal(resized[1029], prepare_images(images[1029:], size=3)[0])


# -- npz -------------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (7, 6, 6, 3), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2, 0]),
        "x_test": generator.integers(0, 256, (3, 6, 6, 3), dtype=np.uint8),
        "y_test": np.array([2, 1, 0]),
        "class_names": np.array(["a", "b", "c"]),
    }


def saved(path: Path, **changes: Any) -> Path:
    file = path / "images.npz"
    np.savez(file, **{name: array for name, array in {**arrays(), **changes}.items() if array is not None})
    return file


def test_npz(tmp_path: Path) -> None:
    data = load_npz(saved(tmp_path))
    assert data.outputs == 3
    assert data.class_names == ("a", "b", "c")
    assert isinstance(data.train, ArraySource)
    x, y = data.train.fetch(torch.arange(7))
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert x.is_contiguous()
    assert np.array_equal(x.numpy().transpose(0, 2, 3, 1), arrays()["x_train"])
    assert data.test is not None
    assert data.test.fetch(torch.arange(3))[1].tolist() == [2, 1, 0]


def test_npz_of_grey_images_without_names(tmp_path: Path) -> None:
    grey = {split: arrays()[split][..., 0] for split in ("x_train", "x_test")}
    labels = arrays()["y_train"].astype(np.uint8)
    file = saved(tmp_path, **grey, y_train=labels, class_names=None)
    data = load_npz(file)
    assert data.class_names == ("0", "1", "2")
    assert data.train.fetch(torch.arange(2))[0].shape == (2, 1, 6, 6)
    large = load_npz(file, size=9, channels=3).train.fetch(torch.arange(7))[0]
    assert large.shape == (7, 3, 9, 9)
    assert torch.equal(large, prepare_images(torch.from_numpy(grey["x_train"])[:, None], size=9, channels=3))


MALFORMED = {
    "missing key": ({"y_test": None}, "array 'y_test' is missing; the file has x_train"),
    "float images": (
        {"x_train": arrays()["x_train"] / 255.0},
        "dtype float64 with values from .* use uint8",
    ),
    "float images to 255": (
        {"x_train": arrays()["x_train"].astype(np.float32)},
        r"dtype float32 with values from \d+ to 25\d; use uint8, 0 to 255: x\.round",
    ),
    "signed images": ({"x_train": arrays()["x_train"] - 128.0}, "from -1.* use uint8, 0 to 255 .scale them first"),
    "RGBA first": ({"x_train": np.ones((7, 4, 6, 6), np.uint8)}, r"channels first; use \[N, H, W, C\] without the"),
    "from 1": ({"y_train": np.array([1, 2, 3, 1, 2, 3, 1])}, "y_train run from 1 to 3, .* 0 to 2; subtract 1 from all"),
    "test class without training": ({"y_train": np.array([0, 1, 1, 0, 1, 0, 0])}, "class 'c' has 1 test images but no"),
    "one name": ({"class_names": np.array("cat")}, r"class_names has shape \[\] and dtype <U3; use a list"),
    "names in two dimensions": ({"class_names": np.array([["a", "b", "c"]])}, r"class_names has shape \[1, 3\]"),
    "a name twice": ({"class_names": np.array(["a", "b", "a"])}, "class_names has 'a' twice"),
    "float labels": ({"y_test": np.ones(3)}, "y_test has dtype float64; use int64"),
    "shape of images": ({"x_test": np.ones((3, 6), dtype=np.uint8)}, r"x_test has shape \[3, 6\]"),
    "channels first": (
        {"x_test": np.ones((3, 3, 6, 6), np.uint8)},
        r"\[3, 3, 6, 6\], channels first; use \[N, H, W, C\]",
    ),
    "no pixels": ({"x_test": np.ones((3, 0, 6), dtype=np.uint8)}, r"x_test has shape \[3, 0, 6\]"),
    "shape of labels": ({"y_train": np.zeros((7, 1), dtype=np.int64)}, r"y_train has shape \[7, 1\]"),
    "counts": ({"y_train": np.arange(6) % 3}, "x_train has 7 images but y_train 6 labels"),
    "too high": ({"y_test": np.array([0, 1, 3])}, "y_test run from 0 to 3, but class_names has 3 classes; use 0 to 2"),
    "negative": ({"y_train": np.array([0, -1, 2, 0, 1, 2, 0])}, "y_train run from -1 to 2"),
    "unseen": ({"y_test": np.array([0, 1, 9]), "class_names": None}, "0 to 9, but y_train has 3 classes"),
    "no training": ({"x_train": np.empty((0, 6, 6, 3), np.uint8), "y_train": np.empty(0, int)}, "y_train is empty"),
    "no test": ({"x_test": np.empty((0, 6, 6, 3), np.uint8), "y_test": np.empty(0, int)}, "x_test is empty"),
    "an identifier": (
        {"y_train": np.arange(7) * 10**9, "class_names": None},
        "class number 6000000000; use",
    ),
    "pickle": ({"class_names": np.array([["a"], [1, 2]], dtype=object)}, "not a readable .npz file"),
}


def test_npz_labels_from_1_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"y_train": np.array([1, 2, 3, 1, 2, 3, 1]), "y_test": np.array([1, 2, 3]), "class_names": None}
    data = load_npz(saved(tmp_path, **labels))
    assert data.outputs == 4
    assert "labels in y_train run from 1 to 3 and none is 0; they are read as 4 classes" in capsys.readouterr().err
    gap = {"y_train": np.array([0, 2, 2, 0, 4, 4, 4]), "y_test": np.array([0, 2, 4]), "class_names": None}
    assert load_npz(saved(tmp_path, **gap)).outputs == 5
    assert "2 of 5 classes have no training image (1, 3)" in capsys.readouterr().err
    four = np.ones((7, 6, 6, 4), np.uint8)
    load_npz(saved(tmp_path, x_train=four, x_test=four[:3]))
    assert "read as 4 channels per image, all of which the model sees; if the fourth" in capsys.readouterr().err
    load_npz(saved(tmp_path))
    assert capsys.readouterr().err == ""
    assert load_npz(saved(tmp_path, class_names=np.array([b"a", b"b", b"c"]))).class_names == ("a", "b", "c")


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed_npz(name: str, tmp_path: Path) -> None:
    changes, message = MALFORMED[name]
    with pytest.raises(UsageError, match=message) as caught:
        load_npz(saved(tmp_path, **changes))
    assert "images.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_npz(tmp_path / "absent.npz")
    for content in (b"", b"not a zip file", saved(tmp_path).read_bytes()[:2000]):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"not a readable \.npz"):
            load_npz(tmp_path / "broken.npz")
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UsageError, match=r"not a readable \.npz"):
        load_npz(tmp_path / "one.npy")
