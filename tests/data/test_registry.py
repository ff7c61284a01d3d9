"""The table of the paper's data sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trajshift.data.registry import find, registered
from trajshift.errors import UsageError
from trajshift.recipes.recipe import validate
from trajshift.recipes.yaml_text import read_yaml

META_TRAINED = {  # section 4.2: pixels and classes of the eight sources
    "tinyimagenet-a": (64, 100),
    "tinyimagenet-b": (64, 100),
    "cifar100": (32, 100),
    "stanford-dogs": (84, 120),
    "fgvc-aircraft": (84, 100),
    "cub200": (84, 200),
    "fashion-mnist": (28, 10),
    "svhn": (32, 10),
}
CLASSES = {"stanford-cars": 196, "quickdraw": 345, "vgg-flowers": 102, "vgg-pets": 37, "stl10": 10} | {
    "cifar10": 10,
    "food101": 101,
    "dtd": 47,
    "tinyimagenet": 200,
    "imagenet-1k": 1000,
}
GROUPS = (113, 131, 121, 121, 120, 95, 155, 144)


def test_the_papers_sets_are_there_with_its_figures() -> None:
    for name, figures in META_TRAINED.items():
        assert (find(name).size, find(name).classes) == figures, name
    for name, classes in CLASSES.items():
        assert find(name).classes == classes, name
    assert len(registered()) == len(META_TRAINED) + len(CLASSES) + len(GROUPS)


def test_no_entry_claims_more_than_is_known() -> None:
    for name, entry in registered().items():
        assert entry.name == name
        assert entry.verified is None
        assert entry.revision is None or re.fullmatch(r"[0-9a-f]{40}", entry.revision)
        assert (entry.revision is None) == ("not pinned" in entry.sources["revision"]), name
        assert {"hub, splits, columns", "classes, images", "size", "flip"} <= set(entry.sources), name
        assert all(entry.sources.values()), name
        assert "not checked" in entry.sources["hub, splits, columns"]


def test_halves_of_tiny_imagenet() -> None:
    assert find("tinyimagenet-a").members == tuple(range(100))
    assert find("tinyimagenet-b").members == tuple(range(100, 200))
    assert find("tinyimagenet-b").whole == "tinyimagenet"


def test_groups_of_imagenet() -> None:
    groups = [find(f"imagenet-group{number}") for number in range(1, 9)]
    assert tuple(group.classes for group in groups) == GROUPS
    members = [number for group in groups for number in group.members or ()]
    assert sorted(members) == list(range(1000))
    assert {group.whole for group in groups} == {"imagenet-1k"}
    # Class numbers that everybody knows: 151 Chihuahua, 281 tabby, 1 goldfish, 817 sports car, 954 banana.
    homes = {number: place for place, group in enumerate(groups, 1) for number in group.members or ()}
    assert [homes[number] for number in (151, 281, 1, 817, 954)] == [3, 6, 4, 2, 8]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown data set 'imagenet-group9'; did you mean 'imagenet-group"):
        find("imagenet-group9")


def test_the_recipe_in_the_docs_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    assert set(validate(read_yaml(text, "docs/data.md")).tasks) == {"tin-a", "digits", "mammals"}
    for name in [name for name, entry in registered().items() if entry.revision is not None]:
        assert f"`{name}`" in page
