"""The rows of `runs/NAME/evaluation.jsonl`: read, appended, collected over runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from trajshift.data.fingerprint import changed
from trajshift.errors import UsageError
from trajshift.evaluation.evaluation_row import JSON_FIELDS, EvaluationRow
from trajshift.recipes.recipe import Recipe, flatten, load
from trajshift.runs.labels import labels_of
from trajshift.runs.starting_points import current_digests
from trajshift.utils.dotted_names import is_within
from trajshift.utils.files import append_row, read_jsonl
from trajshift.utils.seals import add_seal, check_seals

FILE = "evaluation.jsonl"


def read_evaluation(path: Path | str) -> list[EvaluationRow]:
    """The rows of a run's evaluation.jsonl; a half-written last line is left out, and a missing file has none.

    Raises:
        UsageError: the file is damaged.
    """
    file = Path(path) / FILE
    check_seals(file)
    rows = []
    for number, row in enumerate(read_jsonl(file, JSON_FIELDS), 1):
        try:
            rows.append(EvaluationRow.from_json(row))
        except UsageError as error:
            raise UsageError(f"{file} is damaged (line {number}: {error}); fix or delete the line") from None
    return rows


def append_evaluation(path: Path, row: EvaluationRow) -> None:
    """Adds a row to a run's evaluation.jsonl."""
    add_seal(path / FILE, (json.dumps(row.to_json()) + "\n").encode())
    append_row(path / FILE, row.to_json())


def collect(
    paths: Sequence[Path | str],
    section: str = "targets",
    *,
    train_images: Sequence[int | None] | None = None,
    as_asked: bool = False,
) -> tuple[list[EvaluationRow], list[str]]:
    """All saved rows of these runs on one section's tasks, labelled, and notes on rows left out.

    `train_images` takes only these numbers of training images (None in it: all of them), `as_asked` only the targets
    and the fine-tuning of each run's recipe as it stands.
    Where a fine-tuning was repeated with other settings the last one counts; rows from an initialization that
    has been trained further since are left out. Rows without meta-training count once for each seed.
    """
    paths = distinct(paths)
    recipes = {path: load(path) for path in paths}
    labels = labels_of(recipes)
    rows: list[EvaluationRow] = []
    notes = []
    seen = set()
    for path in paths:
        saved = read_evaluation(path)
        fresh = _fresh(path, saved)
        if len(fresh) < len(saved):
            notes.append(
                f"{path.name}: {len(saved) - len(fresh)} saved results are left out, "
                "because their initialization has changed since"
            )
        asked = {name: setting_of(recipes[path], section, name) for name in getattr(recipes[path], section)}
        latest: dict[tuple[Any, ...], EvaluationRow] = {}
        superseded = 0
        for row in fresh:
            wanted = train_images is None or row.train_images in train_images
            stands = not as_asked or row.setting == asked.get(row.target)
            if wanted and stands and row.section == section:
                superseded += row.place in latest and changed(latest[row.place].data, row.data)
                latest[row.place] = row
        if superseded:
            notes.append(f"{path.name}: {superseded} saved results are left out, because the data has changed since")
        for row in latest.values():
            key = (path if row.start.is_meta_trained else None, *row.identity)
            if key not in seen:
                seen.add(key)
                rows.append(labelled(row, path, labels))
    return rows, notes


def _fresh(path: Path, saved: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """The rows whose initialization is still the one that they were computed from, as far as it is there."""
    current = current_digests(path, {row.start for row in saved})
    return [row for row in saved if current.get(row.start, row.phi) == row.phi]


def setting_of(recipe: Recipe, section: str, name: str) -> str:
    """Digest of all that decides a fine-tuning besides phi, seed and the number of images."""
    parts = ("model", "head", "data", "finetune", f"{section}.{name}")
    fields = {
        key.replace(f"{section}.{name}", "target"): value
        for key, value in flatten(recipe).items()
        if is_within(key, parts) and key not in ("data.root", "finetune.train_images")
    }
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def distinct(paths: Sequence[Path | str]) -> list[Path]:
    """Paths of different folders; an empty list is an error."""
    if not paths:
        raise UsageError("no run directory was given; name at least one")
    return list({Path(path).resolve(): Path(path) for path in paths}.values())


def labelled(row: EvaluationRow, path: Path, labels: Mapping[Path, str]) -> EvaluationRow:
    """The row with its label among these runs and the run's name; what was not meta-trained belongs to no run."""
    label = labels[path] if row.start.is_meta_trained else row.start.kind
    return replace(row, label=label, run=path.name)
