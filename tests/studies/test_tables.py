"""The tables and figures of results/images come out of the committed rows as they stand on the page."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest

from studies.images import native, tables
from studies.images.rows import averages, known_rows, steps_to_reach
from studies.images.search import STUDIES
from studies.images.variants import VARIANTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "images"
PAGE = (RESULTS / "README.md").read_text().splitlines()
PINNED = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
STARTS = [
    "trajectory-shifting", "mtl", "leap", "reptile", "no-shifting", "random-shifting", "single-task", "fomaml++",
    "fomaml", "anil", "imaml", "scratch",
]  # fmt: skip
CANDIDATES = ["shifting, meta-momentum 0.9", "shifting, phi averaged over 1500, 2000", "mtl, cosine"]


def printed(app: object, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of tables that a command prints; its figures go to `folder`."""
    app([*words, "--results", str(RESULTS), "--figures", str(folder)], standalone_mode=False)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("words", "figure"),
    [
        ([], None),
        (["--targets", *STARTS], None),
        (STARTS, None),
        (["--draw", *STARTS], "methods"),
        (["--horizon"], "horizon"),
        (["--soon"], "soon"),
        (["--leads", "size-32", "reptile-size-32", "trajectory-shifting", "reptile"], None),
    ],
    ids=["rates", "targets", "differences", "draw", "horizon", "soon", "leads"],
)
def test_the_page_holds_what_the_command_makes(
    words: list[str], figure: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(tables.app, words, tmp_path, capsys)
    assert [line for line in lines if line not in PAGE] == []
    assert lines or figure
    if figure is not None:
        same_figure(tmp_path / f"{figure}.svg")
    assert [file.suffix for file in tmp_path.iterdir()] == ([".svg"] if figure else [])


def same_figure(made: Path) -> None:
    """The committed bytes; another matplotlib than the pinned one may write others."""
    assert made.read_text().startswith("<?xml")
    if PINNED is not None and matplotlib.__version__ == PINNED[1]:
        assert made.read_bytes() == (RESULTS / made.name).read_bytes()


def test_the_section_on_native_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(native.app, [], tmp_path, capsys)
    first = lines[: next(place for place, line in enumerate(lines) if "5,000 | 3 |" in line and "(0.49" in line) + 1]
    assert len(first) == 28
    assert [line for line in first if line not in PAGE] == []
    assert [line for line in lines if line.startswith("| Reptile after") and line not in PAGE] == []
    same_figure(tmp_path / "native.svg")


def test_candidates_are_one_family_of_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trajectory-shifting", CANDIDATES[0], CANDIDATES[1], "joint first, then shifting", CANDIDATES[2]]
    lines = printed(tables.app, words, tmp_path, capsys)
    assert [line for line in lines if line not in PAGE] == []


def test_averages_are_over_targets_within_a_seed() -> None:
    rows = [row for row in known_rows(RESULTS, ["mtl"]) if row["start"] == "mtl"]
    seed_0 = [r for r in rows if (r["seed"], r["train_images"], r["finetune_lr"]) == (0, 250, 0.03)]
    assert len(seed_0) == 3
    expected = 100 * sum(row["accuracy"] for row in seed_0) / 3
    assert averages(rows, 250, 0.03)["mtl"][0] == pytest.approx(expected, rel=1e-12)


def test_steps_to_reach_lie_on_straight_lines() -> None:
    by_steps = {0: 10.0, 100: 20.0, 300: 20.0, 400: 60.0}
    assert steps_to_reach(by_steps, 15.0) == 50.0
    assert steps_to_reach(by_steps, 20.0) == 100.0
    assert steps_to_reach(by_steps, 30.0) == 325.0
    assert steps_to_reach(by_steps, 61.0) == float("inf")


def test_studies_have_names_and_variants_of_their_own() -> None:
    assert len({study.name for study in STUDIES}) == len(STUDIES)
    assert {study.variant for study in STUDIES} - {None} <= VARIANTS.keys()
