"""The paper's data sets by name: where they are on the Hugging Face hub, what they should contain, and the sources.

A plain table that imports neither torch nor `datasets`. **No entry has been checked against the hub**: `verified`
is None until somebody has prepared the set from it and every figure agreed. Until then figures that differ are
warnings; afterwards they are errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from trajshift.errors import UsageError, nearest

GROUPS_FILE = Path(__file__).with_name("imagenet_groups.json")

PAPER = "Shin et al. (2021), section 4.2 and the authors' published code"
PAPER_IMAGENET = "Shin et al. (2021), section 4.3"
OURS = "our choice, the paper does not say"
PUBLIC_CODE = "public code that loads it; not checked"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One registered data set, or some classes of one."""

    name: str
    """What recipes and the command line call it."""
    hub: str
    """Repository on the Hugging Face hub; its files are parquet."""
    revision: str | None = None
    """Commit of the repository; None takes its current main branch."""
    subset: str | None = None
    """Configuration of the repository, where it has several."""
    train: str = "train"
    """Split trained on."""
    test: str = "test"
    """Split tested on."""
    image: str = "image"
    """Column of images."""
    label: str = "label"
    """Column of class numbers."""
    size: int
    """Height and width in pixels to which a cache is resized."""
    channels: int = 3
    """1 for grey images, 3 for colour."""
    classes: int
    train_images: int | None
    """Images of the split trained on, in the repository; None if no source states it."""
    test_images: int | None
    """Images of the split tested on, likewise."""
    per_class: tuple[int, int] | None = None
    """Images of each class that are kept for training and testing; None keeps all."""
    flip: bool = True
    """Whether a mirrored image still belongs to its class; if not, a recipe's `data.flip` is ignored."""
    verified: str | None = None
    """Date (YYYY-MM-DD) on which the set was prepared from the hub and agreed with this entry; None: never."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each fact is from."""
    whole: str | None = None
    """The registered set of which this one has some classes; None for a whole one."""
    members: tuple[int, ...] | None = None
    """Its class numbers in the whole set, in the order of its own; None for a whole one."""


def _sources(*, images: str, size: str = PAPER, revision: str = "", flip: str = OURS, **others: str) -> dict[str, str]:
    return {
        "hub, splits, columns": PUBLIC_CODE,
        "revision": revision or "not pinned: no commit is known",
        "classes, images": images,
        "size": size,
        "flip": flip,
        **others,
    }


_TABLE = (
    DataSet(
        name="tinyimagenet",
        hub="zh-plus/tiny-imagenet",
        test="valid",
        size=64,
        classes=200,
        train_images=100_000,
        test_images=10_000,
        sources=_sources(images="Stanford CS231n, Tiny ImageNet (2015); its test labels are not public"),
    ),
    DataSet(
        name="cifar10",
        hub="uoft-cs/cifar10",
        image="img",
        size=32,
        classes=10,
        train_images=50_000,
        test_images=10_000,
        sources=_sources(images="Krizhevsky (2009)", size="its own size"),
    ),
    DataSet(
        name="cifar100",
        hub="uoft-cs/cifar100",
        image="img",
        label="fine_label",
        size=32,
        classes=100,
        train_images=50_000,
        test_images=10_000,
        sources=_sources(images="Krizhevsky (2009)"),
    ),
    DataSet(
        name="stanford-dogs",
        hub="maurice-fp/stanford-dogs",
        size=84,
        classes=120,
        train_images=12_000,
        test_images=8_580,
        sources=_sources(images="Khosla et al. (2011)"),
    ),
    DataSet(
        name="fgvc-aircraft",
        hub="Donghyun99/FGVC-Aircraft",
        size=84,
        classes=100,
        train_images=6_667,
        test_images=3_333,
        sources=_sources(
            images="Maji et al. (2013), training with validation; whether this repository joins them is not known",
            **{"hub, splits, columns": "public code, which disagrees on splits and columns; not checked"},
        ),
    ),
    DataSet(
        name="cub200",
        hub="bentrevett/caltech-ucsd-birds-200-2011",
        revision="1ef09e021b0b65b40337f6f285909656f407f6e0",
        size=84,
        classes=200,
        train_images=5_994,
        test_images=5_794,
        sources=_sources(images="Wah et al. (2011)", revision=PUBLIC_CODE),
    ),
    DataSet(
        name="fashion-mnist",
        hub="zalando-datasets/fashion_mnist",
        size=28,
        channels=1,
        classes=10,
        train_images=60_000,
        test_images=10_000,
        sources=_sources(images="Xiao et al. (2017)"),
    ),
    DataSet(
        name="svhn",
        hub="ufldl-stanford/svhn",
        subset="cropped_digits",
        size=32,
        classes=10,
        train_images=73_257,
        test_images=26_032,
        flip=False,
        sources=_sources(images="Netzer et al. (2011), without the extra images", flip="digits are not mirrored; ours"),
    ),
    DataSet(
        name="stanford-cars",
        hub="tanganke/stanford_cars",
        revision="9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
        size=84,
        classes=196,
        train_images=8_144,
        test_images=8_041,
        sources=_sources(images="Krause et al. (2013)", size=OURS, revision=PUBLIC_CODE),
    ),
    DataSet(
        name="quickdraw",
        hub="Xenova/quickdraw-small",
        size=28,
        channels=1,
        classes=345,
        train_images=4_500_000,
        test_images=250_000,
        per_class=(200, 50),
        sources=_sources(
            images="Ha and Eck (2017) for the classes; a public list of licences for the images, not checked",
            size="its own size",
            **{"images of each class": "our choice: the paper subsamples to at most about 100,000 images"},
        ),
    ),
    DataSet(
        name="vgg-flowers",
        hub="nelorth/oxford-flowers",
        size=84,
        classes=102,
        train_images=7_169,
        test_images=1_020,
        sources=_sources(
            images="Nilsback and Zisserman (2008): the classes and 8,189 images, in the repository's own split",
            size=OURS,
        ),
    ),
    DataSet(
        name="vgg-pets",
        hub="timm/oxford-iiit-pet",
        size=84,
        classes=37,
        train_images=3_680,
        test_images=3_669,
        sources=_sources(images="Parkhi et al. (2012)", size=OURS),
    ),
    DataSet(
        name="stl10",
        hub="tanganke/stl10",
        revision="49ae7f94508f7feae62baf836db284306eab0b0f",
        size=84,
        classes=10,
        train_images=5_000,
        test_images=8_000,
        sources=_sources(images="Coates et al. (2011)", size=OURS, revision=PUBLIC_CODE),
    ),
    DataSet(
        name="food101",
        hub="ethz/food101",
        test="validation",
        size=224,
        classes=101,
        train_images=75_750,
        test_images=25_250,
        sources=_sources(images="Bossard et al. (2014)", size=PAPER_IMAGENET),
    ),
    DataSet(
        name="dtd",
        hub="tanganke/dtd",
        revision="d2afa97d9f335b1a6b3b09c637aef667f98f966e",
        size=224,
        classes=47,
        train_images=3_760,
        test_images=1_880,
        sources=_sources(
            images="Cimpoi et al. (2014), training with validation; whether this repository joins them is not known",
            size=PAPER_IMAGENET,
            revision=PUBLIC_CODE,
        ),
    ),
    DataSet(
        name="imagenet-1k",
        hub="ILSVRC/imagenet-1k",
        test="validation",
        size=224,
        classes=1_000,
        train_images=1_281_167,
        test_images=50_000,
        sources=_sources(
            images="Russakovsky et al. (2015); its test labels are not public",
            size=PAPER_IMAGENET,
            access="gated: accept its terms on the hub, then log in with: huggingface-cli login",
        ),
    ),
)


def some_classes(whole: DataSet, name: str, members: tuple[int, ...], source: str) -> DataSet:
    """The entry of some classes of a whole set, renumbered from 0 in the order of `members`."""
    return replace(
        whole,
        name=name,
        classes=len(members),
        train_images=None,
        test_images=None,
        sources={**whole.sources, "members": source},
        whole=whole.name,
        members=members,
    )


@cache
def registered() -> dict[str, DataSet]:
    """Every registered data set by name."""
    known = {entry.name: entry for entry in _TABLE}
    tiny, imagenet = known["tinyimagenet"], known["imagenet-1k"]
    halves = {"tinyimagenet-a": tuple(range(100)), "tinyimagenet-b": tuple(range(100, 200))}
    for name, members in halves.items():
        known[name] = some_classes(tiny, name, members, PAPER)
    for name, group in json.loads(GROUPS_FILE.read_text(encoding="utf-8")).items():
        source = f"{group['description']}; our groups with the paper's counts, see IMAGENET_GROUPS.md"
        known[name] = some_classes(imagenet, name, tuple(group["classes"]), source)
    return known


def find(name: str) -> DataSet:
    """The entry of a name.

    Raises:
        UsageError: no such entry; names the nearest.
    """
    if name not in registered():
        raise UsageError(f"unknown data set {name!r}{nearest(name, registered())}")
    return registered()[name]


def differences(entry: DataSet, classes: int, train: int, test: int) -> list[str]:
    """Where the figures of an entry differ from what was found, one sentence each."""
    triples = (
        ("classes", entry.classes, classes),
        (f"images in split {entry.train!r}", entry.train_images, train),
        (f"images in split {entry.test!r}", entry.test_images, test),
    )
    return [f"{found} {what} were found, {said} are registered" for what, said, found in triples if found != said]
