"""The rows of `runs/NAME/evaluation.jsonl`: read, appended, collected over runs; torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import UNTRAINED, Row, label_runs
from trajshift.recipes.recipe import Recipe, flatten, load
from trajshift.recipes.short_names import in_short_names
from trajshift.runs.starting_points import digests_of
from trajshift.utils.files import read_jsonl

FILE = "evaluation.jsonl"
_FIELDS = {"checkpoint": (str, int), "target": str, "steps": int, "seed": int, "inner_steps": int, "method": str}


def collect(
    paths: Sequence[Path | str],
    section: str = "targets",
    *,
    train_images: Sequence[int | None] | None = None,
    as_asked: bool = False,
) -> tuple[list[Row], list[str]]:
    """All saved rows of these runs on one section's tasks, labelled, and notes on rows left out.

    `train_images` takes only these numbers of training images (None in it: all of them), `as_asked` only the targets
    and the fine-tuning of each run's recipe as it stands.
    Where a fine-tuning was repeated with other settings the last one counts; rows from an initialization that
    has been trained further since are left out. Rows without meta-training count once for each seed.
    """
    paths = distinct(paths)
    recipes = {path: load(path) for path in paths}
    labels = labels_of(recipes)
    rows: list[Row] = []
    notes = []
    seen = set()
    for path in paths:
        latest: dict[tuple[Any, ...], Row] = {}
        saved = read_evaluation(path)
        current = digests_of(path, {row["checkpoint"] for row in saved})
        fresh = [row for row in saved if current.get(row["checkpoint"], row.get("phi")) == row.get("phi")]
        if len(fresh) < len(saved):
            notes.append(
                f"{path.name}: {len(saved) - len(fresh)} saved results are left out, "
                "the initialization behind them has changed since"
            )
        asked = {name: setting_of(recipes[path], section, name) for name in getattr(recipes[path], section)}
        for row in fresh:
            wanted = train_images is None or row.get("train_images") in train_images
            stands = not as_asked or row.get("setting") == asked.get(row["target"])
            if wanted and stands and row.get("section", "targets") == section:
                latest[place_of(row)] = row
        for row in latest.values():
            key = (None if row["checkpoint"] in UNTRAINED else path, *identity_of(row))
            if key not in seen:
                seen.add(key)
                rows.append(labelled(row, path, labels))
    return rows, notes


def read_evaluation(path: Path | str) -> list[Row]:
    """The rows of a run's evaluation.jsonl; a half-written last line is left out, a missing file has none."""
    return read_jsonl(Path(path) / FILE, _FIELDS)


def place_of(row: Row) -> tuple[Any, ...]:
    """What a saved row is a result for, within its run."""
    return row["checkpoint"], row["target"], row.get("train_images"), row["steps"]


def identity_of(row: Row) -> tuple[Any, ...]:
    """Two rows with this in common hold the same numbers."""
    return (*place_of(row), row["seed"], row.get("setting"), row.get("phi"))


def setting_of(recipe: Recipe, section: str, name: str) -> str:
    """Digest of all that decides a fine-tuning besides phi, seed and the number of images."""
    parts = ("model", "head", "data", "finetune", f"{section}.{name}")
    fields = {
        key.replace(f"{section}.{name}", "target"): value
        for key, value in flatten(recipe).items()
        if any(key == part or key.startswith(f"{part}.") for part in parts)
        and key not in ("data.root", "finetune.train_images")
    }
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def distinct(paths: Sequence[Path | str]) -> list[Path]:
    """Paths of different folders; refuses none at all."""
    if not paths:
        raise UsageError("no run directory was given; name at least one")
    return list({Path(path).resolve(): Path(path) for path in paths}.values())


def labels_of(recipes: Mapping[Path, Recipe]) -> dict[Path, str]:
    """`comparison.label_runs` for recipes."""
    return label_runs({path: in_short_names(flatten(recipe)) for path, recipe in recipes.items()})


def labelled(row: Row, path: Path, labels: Mapping[Path, str]) -> Row:
    """The row with its label among these runs and the run's name; what was not meta-trained belongs to no run."""
    start = row["checkpoint"]
    return row | {"label": start if start in UNTRAINED else labels[path], "run": path.name}
