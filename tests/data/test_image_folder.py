"""Folders of images, read by our own walk: every image in one split and one class, or one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import hub
from trajshift.data.huggingface import hf_source, load_hf
from trajshift.data.sources import ImageData, labels_of
from trajshift.errors import UsageError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with hub.offline(tmp_path_factory.mktemp("cache")):
        yield


def picture(number: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def folder(root: Path, layout: Mapping[str, int | list[str]]) -> Path:
    """`{"train/cat": 4}`: a folder with so many different PNG files, or with files of these names."""
    for start, (place, files) in enumerate(layout.items()):
        (root / place).mkdir(parents=True, exist_ok=True)
        names = [f"{number}.png" for number in range(files)] if isinstance(files, int) else files
        for number, name in enumerate(names):
            Image.fromarray(picture(1000 * start + number)).save(root / place / name, format="PNG")
    return root


def counts(data: ImageData) -> tuple[dict[str, int], dict[str, int] | None]:
    def of(source: Any) -> dict[str, int]:
        labels = labels_of(source)
        assert labels is not None
        return dict(zip(data.class_names, torch.bincount(labels, minlength=data.outputs).tolist(), strict=True))

    return of(data.train), None if data.test is None else of(data.test)


@pytest.mark.parametrize(
    "names",
    [
        ("apple", "tank", "train"),
        ("beach", "test_tube", "train_station"),
        ("__background__", "validation set", "val"),
        ("a[b]", "a*", "what?"),
        ("UPPER", "0", "é"),
    ],
)
@pytest.mark.parametrize("split", [True, False])
def test_names_of_classes_decide_nothing(names: tuple[str, ...], split: bool, tmp_path: Path) -> None:
    if split:
        layout = {f"{part}/{name}": size for part, size in (("train", 6), ("test", 3)) for name in names}
        expected = (dict.fromkeys(names, 6), dict.fromkeys(names, 3))
        data = load_hf(folder(tmp_path, layout))
    else:
        expected = (dict.fromkeys(names, 5), dict.fromkeys(names, 1))
        data = load_hf(folder(tmp_path, dict.fromkeys(names, 6)), test=0.2)
    assert data.class_names == tuple(sorted(names))
    assert counts(data) == expected
    assert [*counts(data)[0]] == sorted(names)


def test_names_of_files_decide_nothing(tmp_path: Path) -> None:
    files = ["0.png", "1.PNG", "2.JpG", "holiday train 1.png", "test.png", "val-3.bmp", "x [1].gif", "y*.webp", "plain"]
    assert counts(load_hf(folder(tmp_path, {"beach": files, "street": files}))) == ({"beach": 9, "street": 9}, None)


def test_pixels_labels_and_order(tmp_path: Path) -> None:
    data = load_hf(folder(tmp_path, {"train/dog": 2, "train/cat": 3, "test/cat": 1, "test/dog": 1}))
    x, y = data.train.fetch(torch.arange(5))
    assert y.tolist() == [0, 0, 0, 1, 1]
    expected = np.stack([picture(number) for number in (1000, 1001, 1002, 0, 1)])
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), expected)
    assert data.test is not None
    assert np.array_equal(data.test.fetch(torch.tensor([1]))[0][0].permute(1, 2, 0).numpy(), picture(3000))


def test_links_are_followed_without_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = folder(tmp_path / "pool", {"owl": 4})
    root = folder(tmp_path / "root", {"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2})
    (root / "train" / "owl").symlink_to(pool / "owl")
    (root / "train" / "cat" / "again").symlink_to(root)
    (root / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for split in ("train", "test"):
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / split).symlink_to(root / split)
    for place in (root, tmp_path / "linked"):
        if place != root:
            (root / "train" / "cat" / "again").unlink()
        assert counts(load_hf(place)) == ({"cat": 4, "dog": 4, "owl": 4}, {"cat": 2, "dog": 2, "owl": 0})
        told = capsys.readouterr().err
        assert "broken links: 1 (train/dog/gone.png)" in told
        assert ("links to a folder that contains them: 1 (train/cat/again)" in told) == (place == root)


def test_all_formats_that_pillow_opens(tmp_path: Path) -> None:
    suffixes = [".png", ".JPEG", ".bmp", ".tif", ".gif", ".webp", ".ppm", ".tga", ".jp2"]
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for number, suffix in enumerate(suffixes):
            Image.fromarray(picture(number)).save(tmp_path / kind / f"{number}{suffix}")
    assert counts(load_hf(tmp_path, size=8, channels=3))[0] == {"a": 9, "b": 9}


def test_the_orientation_in_exif_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6  # turn right by 90 degrees to display
        Image.fromarray(upright).save(tmp_path / kind / "0.jpg", exif=exif, quality=95)
    x, _ = load_hf(tmp_path).train.fetch(torch.tensor([0]))
    assert x.shape == (1, 3, 32, 16)
    assert int(x[0, :, :12].min()) > 200
    assert int(x[0, :, 20:].max()) < 50


def test_what_is_passed_over_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, {f"{split}/{kind}": 4 for split in ("train", "test") for kind in ("cat", "dog")})
    for file in list(root.rglob("*.png")):
        for suffix in (".txt", ".json", ".xml", ".csv"):
            file.with_suffix(suffix).write_text("0 .5 .5 .1 .1")
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "cat" / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (root / "train" / "preview.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    (root / "train" / "metadata.csv").write_text("file_name,caption\n")
    (root / "labels").mkdir()
    folder(root, {"extra/cat": 3})
    assert counts(load_hf(root)) == ({"cat": 4, "dog": 4}, {"cat": 4, "dog": 4})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {root}: 72 entries are not used: annotations: 65 (test/cat/0.csv, ")
    for part in (
        "hidden: 1 (train/cat/.DS_Store)",
        "no image that Pillow opens: 1 (train/cat/film.mp4)",
        "outside the class folders: 1 (train/preview.png)",
        "in a folder that is neither the training nor the test split: 3 (extra/cat/0.png, ",
        "folders without images: 1 (labels)",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("layout", "seen"),
    [
        (
            {f"{s}/{c}/{w}": 1 for s in ("train", "test") for c in ("church", "inn") for w in ("in", "out")},
            "train/church",
        ),
        (
            {f"{c}/{w}": 1 for c in ("church", "inn") for w in ("indoor", "outdoor")},
            "church/ contains the folder indoor/",
        ),
        ({"Train/cat": 1, "Train/dog": 1, "Test/cat": 1, "Test/dog": 1}, "if Test and Train are the splits, set"),
        ({"trn/cat": 1, "trn/dog": 1, "hold/cat": 1, "hold/dog": 1}, "hold/ contains the folder cat/"),
        ({"train": 4, "test": 2}, "train/ contains images, not class folders"),
        ({"train/cat": 2, "train/dog": 2, "test": 2}, "test/ contains images, not class folders"),
        ({"train/steam": 2, "train/diesel": 2, "beach": 2}, "train/ contains class folders, but beach/ images"),
        ({"pets/train/cat": 2, "pets/train/dog": 2}, "perhaps name the folder pets inside it"),
        ({"images/train": 2, "images/val": 2}, "images/ contains the folder train/"),
        ({"": 3}, "images lie in no class folder"),
    ],
)
def test_other_layouts_are_refused(layout: dict[str, int], seen: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_hf(folder(tmp_path, layout))
    assert seen in str(caught.value)
    assert "wanted: train/CLASS/* and test/CLASS/*, or CLASS/*" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_of_other_names_are_named_in_options(tmp_path: Path) -> None:
    root = folder(tmp_path, {"Train/cat": 4, "Train/dog": 4, "Hold/cat": 2, "Hold/dog": 2})
    assert counts(load_hf(root, train="Train", test="Hold")) == ({"cat": 4, "dog": 4}, {"cat": 2, "dog": 2})
    with pytest.raises(UsageError, match="there is no split 'Hodl'; did you mean 'Hold'"):
        load_hf(root, train="Train", test="Hodl")


def test_one_class_and_classes_of_one_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has one class folder, 'cat'; classification needs at least 2"):
        load_hf(folder(tmp_path / "one", {"cat": 4}))
    layout = {"train/cat": 2, "train/dog": 2, "test/cat": 2, "test/Dog": 3}
    with pytest.raises(UsageError, match="class 'Dog' has 3 test images but no training image; did you mean 'dog'"):
        load_hf(folder(tmp_path / "absent", layout))
    root = folder(tmp_path / "film", {"train/cat": 2, "train/dog": 2})
    (root / "train" / "hen").mkdir()
    (root / "train" / "hen" / "0.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UsageError, match=r"train/hen: none of its 1 files is an image that Pillow opens \(\.heic\)"):
        load_hf(root)


def test_class_names_agree_across_forms_of_unicode(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/caf\u00e9": 2, "train/bar": 2, "test/cafe\u0301": 1, "test/bar": 1})
    assert counts(load_hf(root)) == ({"bar": 2, "caf\u00e9": 2}, {"bar": 1, "caf\u00e9": 1})
    folder(root, {"train/cafe\u0301": 1})
    with pytest.raises(UsageError, match="in two forms of Unicode; join them"):
        load_hf(root)


def test_one_split_alone_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/cat": 2, "train/dog": 2, "train/eel": 2, "test/dog": 1, "test/eel": 1})
    labels = labels_of(hf_source(root, "test"))
    assert labels is not None
    assert labels.tolist() == [1, 2]


def test_no_file_is_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "a", {"train/cat": 2, "train/dog": 2, "test/dog": 1})
    (root / "test" / "cat").symlink_to(root / "train" / "cat")
    with pytest.raises(UsageError, match=r"test/cat/0\.png is the same file as train/cat/0\.png"):
        load_hf(root)
    root = folder(tmp_path / "b", {"cat": 4, "dog": 4})
    for number in range(4):
        (root / "cat" / f"link{number}.png").symlink_to(root / "cat" / f"{number}.png")
    assert counts(load_hf(root, test=0.5)) == ({"cat": 2, "dog": 2}, {"cat": 2, "dog": 2})
    assert "further links to a file that is used: 4" in capsys.readouterr().err
    os.link(root / "cat" / "0.png", root / "dog" / "hard.png")
    with pytest.raises(UsageError, match="are one file"):
        load_hf(root, test=0.5)


@pytest.mark.parametrize("split", [True, False])
def test_identical_images_in_training_and_test_are_counted(
    split: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if split:
        root = folder(tmp_path, {"train/cat": 4, "train/dog": 4, "test/cat": 3, "test/dog": 3})
        for number in range(2):
            shutil.copy(root / "train" / "dog" / f"{number}.png", root / "test" / "cat" / f"copy{number}.png")
        load_hf(root)
        assert "2 of 8 test images are identical to training images (test/cat/copy0.png is train/dog/0.png)" in (
            capsys.readouterr().err
        )
        return
    root = folder(tmp_path, {"cat": 4, "dog": 4})
    for kind in ("cat", "dog"):
        for number in range(1, 4):
            shutil.copy(root / kind / "0.png", root / kind / f"{number}.png")
    load_hf(root, test=0.5)
    assert "4 of 4 test images are identical to training images" in capsys.readouterr().err


def test_folders_with_characters_of_patterns_in_their_names(tmp_path: Path) -> None:
    layout = {f"{split}/{kind}": 2 for split in ("train", "test") for kind in ("cat", "dog")}
    expected = ({"cat": 2, "dog": 2}, {"cat": 2, "dog": 2})
    for name in ("pets [v2]", "pets*", "pets_old", "{a,b}", "train?"):
        assert counts(load_hf(folder(tmp_path / name, layout))) == expected


def test_tables_and_archives_beside_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "both", {"train/cat": 2, "train/dog": 2})
    (root / "train" / "metadata.parquet").write_bytes(b"PAR1")
    (root / "train" / "cat" / "metadata.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    assert counts(load_hf(root)) == ({"cat": 3, "dog": 2}, None)
    (root / "features.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="has class folders of images and parquet or arrow files too"):
        load_hf(root)
    zipped = folder(tmp_path / "zip", {"train/cat": 2, "train/dog": 2})
    shutil.make_archive(str(tmp_path / "pack" / "images"), "zip", zipped)
    with pytest.raises(UsageError, match="unpack them into class folders"):
        load_hf(tmp_path / "pack")
    with pytest.raises(UsageError, match="is a folder of images, for which subset has no meaning; drop it"):
        load_hf(zipped, subset="en", image="image", label="label")


def test_a_cache_is_prepared_from_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trajshift.data.cache_reader import read_manifest
    from trajshift.data.cache_writer import prepare_cache
    from trajshift.data.registry import find

    names = ["beach", "test_tube", "train", "train_station", *(f"c{number}" for number in range(6))]
    layout = {f"{split}/{name}": size for split, size in (("train", 3), ("test", 2)) for name in names}
    root = folder(tmp_path / "copy", layout)
    (root / "train" / "beach" / "0.txt").write_text("0 .5 .5 .1 .1")
    shutil.copy(root / "train" / "train" / "0.png", root / "test" / "train" / "0.png")
    made = prepare_cache("cifar10", tmp_path / "caches", copy=root, overrides={"size": 8})
    told = capsys.readouterr().err
    assert "1 entry is not used: annotations: 1 (train/beach/0.txt)" in told
    assert "1 of 20 test images are identical to training images (test/train/0.png is train/train/0.png)" in told
    assert read_manifest(made, find("cifar10"))["class_names"] == sorted(names)
    for split, size in (("train", 3), ("test", 2)):
        assert np.load(made / f"{split}-labels.npy").tolist() == [number for number in range(10) for _ in range(size)]
    first = np.load(made / "train-images.npy")[0]
    assert np.array_equal(first.transpose(1, 2, 0), picture(0))
    with pytest.raises(UsageError, match="absent: no such file or folder"):
        prepare_cache("cifar10", tmp_path / "others", copy=tmp_path / "absent")


def test_a_missing_folder_is_never_another_projects_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trajshift.recipes.build_tasks import build_task
    from trajshift.recipes.sections import DataRecipe, TaskRecipe

    def called(*arguments: Any, **options: Any) -> None:
        raise AssertionError("datasets was asked")

    monkeypatch.setattr(datasets, "load_dataset", called)
    for name in ("aerial", "./aerial", "a/b/c", "aerial.v2"):
        with pytest.raises(UsageError, match="no such file or folder") as caught:
            load_hf(name)
        assert os.path.abspath(name) in str(caught.value)
        with pytest.raises(UsageError, match="no such file or folder") as caught:
            build_task("x", TaskRecipe(source=f"hf:{name}"), DataRecipe(root=str(tmp_path / "root [1]")))
        assert os.path.abspath(tmp_path / "root [1]" / name) in str(caught.value)
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "owner" / "name", {"cat": 2, "dog": 2})  # where one stands, not in data.root
    with pytest.raises(UsageError, match="owner/name is a folder of the current directory, which is not"):
        build_task("x", TaskRecipe(source="hf:owner/name"), DataRecipe(root="data"))
    (tmp_path / "owner").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="datasets was asked"):
        build_task("x", TaskRecipe(source="hf:owner/name"), DataRecipe(root="data"))
    assert f"there is no {tmp_path}/data/owner/name; looking up owner/name on the hub" in capsys.readouterr().err
