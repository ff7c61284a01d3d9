"""Recipes as users write them, and as nobody should: names stay names, and what is broken is one sentence, soon."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trajshift.errors import UsageError
from trajshift.recipes.recipe import load, to_yaml
from trajshift.recipes.yaml_text import parse_value, read_yaml

NAMES = ["no", "on", "yes", "off", "y", "007", "0x10", "1", "1_0", "1e3", "2024-01-01", "true", "null", "0o7"]
TEXT = """
horizon: 2
rounds: 1
tasks:
  {name}: {{source: "digits:upright"}}
  other: {{source: "digits:turned"}}
train_on: [{name}]
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_was_written(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT.format(name=name))
    recipe = load(file, [f"output.name={name}"])
    assert [*recipe.tasks] == [name, "other"]
    assert recipe.train_on == [name]
    if name != "null":
        assert recipe.output.name == name
    file.write_text(to_yaml(recipe))
    assert load(file) == recipe
    assert load(file, [f"train_on=[{name}]"]).train_on == [name]


def test_values_have_the_types_of_yaml_1_2() -> None:
    text = "[no, 12:30, 1:30.5, 2024-13-45, =, 0x1F, 007, 1e-3, 12, -1_000, .5, true, null, ~, .inf]"
    expected = ["no", "12:30", "1:30.5", "2024-13-45", "=", "0x1F", "007", 0.001, 12, -1000, 0.5, True, None, None]
    assert parse_value(text) == [*expected, float("inf")]


def test_merge_keys() -> None:
    text = """
    a: &a {x: 1, y: 2}
    deep: {er: &b {<<: *a, y: 3}}
    c: {<<: *b, z: 4}
    d: {<<: [*b, {x: 9, w: 5}], w: 6}
    """
    found = read_yaml(text, "F")
    assert found["deep"]["er"] == {"x": 1, "y": 3}
    assert found["c"] == {"x": 1, "y": 3, "z": 4}
    assert found["d"] == {"x": 1, "y": 3, "w": 6}


LAUGHS = "a0: &a0 [x]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(12))
BROKEN = {
    "[a]: 1": "a key is a list or a mapping",
    "? {a: b}\n: 1": "a key is a list or a mapping",
    "a: 1\na: 2": "'a' is given twice",
    "a: {<<: 3}": "expected a mapping",
    "a: " + "1" * 5000: "a number has 5000 digits",
    "a: !!int x": "'x' is not a number",
    "a: !!timestamp 2024-13-45": "could not determine a constructor",
    "a: !!python/object:os.system x": "could not determine a constructor",
    "a: &a [*a]": "inside of what it stands for",
    "a: &a {b: {c: *a}}": "inside of what it stands for",
    LAUGHS: "more than 200,000 values",
    "[" * 100_000: "more than 40 levels deep",
    "{a: " * 5_000: "more than 40 levels deep",
    "- " * 5_000: "more than 40 levels deep",
    "a: \x00": "special characters are not allowed",
    "x" * 3_000_000: "3,000,000 letters",
}


@pytest.mark.parametrize("text", BROKEN, ids=[sentence.replace(" ", "-") for sentence in BROKEN.values()])
def test_a_broken_or_hostile_recipe_is_one_sentence_soon(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read_yaml(text, "mine.yaml")
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith("mine.yaml ")
    assert BROKEN[text] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_hostile_override_is_one_sentence() -> None:
    for value in ("1" * 5000, "[" * 1000, "&a [*a]"):
        with pytest.raises(UsageError) as caught:
            load("digits", [f"seed={value}"])
        assert len(str(caught.value)) < 500


def test_wrong_values_are_not_repeated_at_length() -> None:
    with pytest.raises(UsageError) as caught:
        load("digits", [f"seed={json.dumps(['x' * 5000])}"])
    assert len(str(caught.value)) < 500


def test_print_config_says_what_null_is_resolved_to(tmp_path: Path) -> None:
    from trajshift.recipes.recipe import to_explained_yaml

    recipe = load("digits", ["method=reptile", "horizon=7", "meta.every=null"])
    text = to_explained_yaml(recipe)
    assert "  every: null  # by the method: 7\n" in text
    assert "  carry: null  # by the method: " in text
    assert "  lr: null  # by the method: 0.01\n" in to_explained_yaml(load("small-images", ["horizon=1000"]))
    (tmp_path / "mine.yaml").write_text(text)
    recipe.data = replace(recipe.data, root=str(tmp_path))  # relative to the file that it stands in now
    assert load(tmp_path / "mine.yaml") == recipe
