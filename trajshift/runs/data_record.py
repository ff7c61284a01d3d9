"""What a run was trained on, as digests in its data.json: a resume on other data is refused. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.data.fingerprint import changed, touched
from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe
from trajshift.recipes.source_digests import source_digest
from trajshift.utils.files import parsed_json, write_json

if TYPE_CHECKING:
    from trajshift.task import Task

FILE = "data.json"


def data_of(recipe: Recipe, tasks: Mapping[str, Task]) -> dict[str, str | None]:
    """The digest of each source task's data, by the task's name."""
    return {name: source_digest(task, recipe.data, tasks.get(name)) for name, task in recipe.source_tasks().items()}


def read_record(run: Path) -> dict[str, Any]:
    """What a run has recorded; empty for one of version 0.1, or where the file is damaged."""
    try:
        record = parsed_json((run / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(run: Path, tasks: Mapping[str, str | None], start: str | None) -> None:
    """Record the digests of the tasks' data and of the file that phi started from; what is unknown now stays."""
    record = read_record(run)
    known = record.get("tasks") if isinstance(record.get("tasks"), dict) else {}
    known = {**(known or {}), **{name: digest for name, digest in tasks.items() if digest is not None}}
    write_json(run / FILE, {"tasks": known, "initialization": start or record.get("initialization")})


def refuse_changed_data(run: Path, old: Recipe, new: Recipe, now: Mapping[str, str | None]) -> list[str]:
    """Compare the data of tasks whose recipe stayed as it was with the record; returns warnings.

    Raises:
        UsageError: names the first task whose data has changed.
    """
    record = read_record(run).get("tasks")
    if not isinstance(record, dict):
        return []
    before, after = old.source_tasks(), new.source_tasks()
    warnings = []
    for name in after:
        before_now = record.get(name), now.get(name)
        if name not in before or asdict(before[name]) != asdict(after[name]) or not isinstance(before_now[0], str):
            continue
        what = f"the data of task {name!r} ({after[name].source}, data.root {new.data.root})"
        if changed(*before_now):
            raise UsageError(
                f"{what} has changed since {run} was trained on it; put the old data back, or start a run of another "
                "name"
            )
        if touched(*before_now):
            warnings.append(f"warning: {what} was written to since {run} was trained on it; what was sampled is equal")
    return warnings


def start_digest(initialization: str | None) -> str | None:
    """SHA-256 of the file that phi starts from; None where there is none, or it is not a local file."""
    if initialization is None or not Path(initialization).is_file():
        return None
    state = sha256()
    with open(initialization, "rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def refuse_another_start(run: Path, old: str | None, new: str | None) -> None:
    """Refuse to resume from another initialization under another path; one that was moved is the same.

    Raises:
        UsageError: the file at the new path is not the one that the run started from.
    """
    if old == new:
        return
    before, now = read_record(run).get("initialization") or start_digest(old), start_digest(new)
    if before is not None and now is not None and before != now:
        raise UsageError(
            f"{run} started from another file than {new}; leave initialization out, as phi is in the checkpoint"
        )
