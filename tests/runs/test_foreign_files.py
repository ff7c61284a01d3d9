"""A run writes only into a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from trajshift.errors import UsageError
from trajshift.recipes.recipe import load
from trajshift.runs.directory import OWN_FILES
from trajshift.runs.train import train

TINY = ["horizon=2", "rounds=1", "batch_size=4", "threads=1", "model.options.width=4", "train_on=[upright]",
        "output.tensorboard=false"]  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", sorted({*OWN_FILES} - {"checkpoints", "tensorboard"}))
def test_a_file_that_no_run_wrote_is_left_alone(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# my notes\n{}")
    with pytest.raises(UsageError, match=r"was not written by trajshift|is not valid YAML|is not a mapping"):
        train(load("digits", TINY), tmp_path, resume=resume, quiet=True)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "# my notes\n{}"


def test_a_users_recipe_and_rows_beside_each_other_are_left_alone_on_resume(tmp_path: Path) -> None:
    recipe = load("digits", TINY)
    from trajshift.recipes.recipe import to_yaml

    for name, text in (("recipe.yaml", to_yaml(recipe)), ("metrics.jsonl", '{"step": 2, "mine": true}\n')):
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="was not written by trajshift"):
        train(recipe, tmp_path, resume=True, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "mine": true}\n'


def test_a_link_in_a_run_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="checkpoints is a link"):
        train(load("digits", TINY), tmp_path / "run", quiet=True)
    assert not [*elsewhere.iterdir()]


@pytest.mark.parametrize(
    ("name", "sentence"), [(".", "choose a name"), ("..", "choose a name"), ("x" * 260, "260 letters long")]
)
def test_a_name_that_is_no_folder_of_its_own_is_refused_before_training(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load("digits", [f"output.name={name}"])


def test_a_long_recipe_name_is_one_sentence_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"choose another output\.directory"):
        train(load("digits", TINY), tmp_path / ("x" * 260), quiet=True)


def test_a_run_that_failed_before_its_first_row_may_be_started_again(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        train(load("digits", [*TINY, "horizon=6", "inner.lr=1e30"]), tmp_path / "r", quiet=True)
    assert train(load("digits", TINY), tmp_path / "r", resume=False, quiet=True).complete
