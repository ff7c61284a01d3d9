"""What run directories hold, read for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, load
from trajshift.runs.collect_rows import distinct
from trajshift.runs.labels import labels_of
from trajshift.utils.files import parsed_json, read_jsonl, shortened
from trajshift.utils.seals import check_seals


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run directory contains."""

    path: Path
    label: str
    recipe: Recipe
    metrics: list[dict[str, Any]]
    """metrics.jsonl, a row for each step that was logged."""
    timing: list[dict[str, Any]]
    environment: dict[str, Any]
    choices: dict[str, Any]
    """What the recipe left open and the trainer resolved."""

    @property
    def last(self) -> dict[str, Any]:
        """The last row of metrics; empty for a run that logged nothing."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def seconds(self) -> float | None:
        """Wall time of training, where it was written."""
        return float(self.timing[-1]["seconds"]) if self.timing and "seconds" in self.timing[-1] else None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads the run directories; every file but the recipe may be missing."""
    recipes = {path: load(path) for path in distinct(paths)}
    labels = labels_of(recipes)
    return [
        Run(
            path=path,
            label=labels[path],
            recipe=recipe,
            metrics=_metrics(path / "metrics.jsonl", {"step": int, "inner_steps": int, "tasks": dict}),
            timing=read_jsonl(path / "timing.jsonl", {"step": int, "seconds": (int, float)}),
            environment=_read_json(path / "environment.json"),
            choices=_read_json(path / "choices.json"),
        )
        for path, recipe in recipes.items()
    ]


def _metrics(file: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, compared with their digests.

    Raises:
        UsageError: a row was changed, or something in it is not the number that it should be.
    """
    check_seals(file)
    rows = read_jsonl(file, fields)
    for number, row in enumerate(rows, 1):
        readings = row.get("approximation_errors", [])
        groups = [*row["tasks"].values(), *(readings if isinstance(readings, list) else [None])]
        numbers = [row.get("meta_update_norm")]
        for group in groups:
            numbers += [value for key, value in group.items() if key != "task"] if isinstance(group, dict) else [group]
        wrong = [
            value for value in numbers if isinstance(value, bool) or not isinstance(value, (int, float, type(None)))
        ]
        wrong += [group for group in groups if not isinstance(group, dict)]
        if wrong:
            raise UsageError(
                f"{file} is damaged (line {number} has {shortened(repr(wrong[0]))} in place of a number); "
                "fix or delete the line"
            )
    return rows


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = parsed_json(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        if not isinstance(content.get("earlier_starts", []), list):
            raise ValueError("earlier_starts is not a list")
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); delete it to continue without it") from None
    return content


def task_names(run: Run) -> list[str]:
    """The tasks that the run was meta-trained on last."""
    return list(run.last.get("tasks") or run.recipe.source_tasks())


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each label, in their order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups
