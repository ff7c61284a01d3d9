"""Fields that version 0.1 had at the top of a recipe, and their places now: one table, `settings.SHORT_NAMES`.

Files and overrides may use either name. What must not change between versions (the fingerprint of a run, the labels of
a report) uses the short ones. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trajshift.errors import UsageError
from trajshift.settings import SHORT_NAMES

_SHORT = {path: name for name, path in SHORT_NAMES.items()}


def put_in_sections(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A recipe's plain mapping with the fields of short names in their sections; `data` itself stays as it is.

    Raises:
        UsageError: a field has two values, one under each name.
    """
    moved = {name: value for name, value in data.items() if name not in SHORT_NAMES}
    for name in data.keys() & SHORT_NAMES.keys():
        section, _, field = SHORT_NAMES[name].partition(".")
        fields = moved.get(section)
        if fields is not None and not isinstance(fields, Mapping):
            continue  # reported later, as a section of the wrong type
        if fields is not None and field in fields and fields[field] != data[name]:
            raise UsageError(
                f"{where}: {name} is {data[name]!r} and {SHORT_NAMES[name]} is {fields[field]!r}, "
                f"but they are one field; keep {SHORT_NAMES[name]}"
            )
        moved[section] = {**(fields or {}), field: data[name]}
    return moved


def full_path(path: list[str]) -> list[str]:
    """The path of a field, whichever of its names it was given by."""
    return [*SHORT_NAMES[path[0]].split("."), *path[1:]] if path[0] in SHORT_NAMES else path


def short_path(path: list[str]) -> list[str]:
    """The inverse of `full_path`."""
    section = ".".join(path[:2])
    return [_SHORT[section], *path[2:]] if section in _SHORT else path


def refuse_two_names(overrides: Iterable[tuple[str, Any]]) -> None:
    """Refuse overrides, as paths and values, that give one field two values, one under each of its names.

    Raises:
        UsageError: names both.
    """
    seen: dict[str, dict[str, Any]] = {}
    for path, value in overrides:
        full = ".".join(full_path(path.split(".")))
        seen.setdefault(full, {})[path] = value
        for other in seen[full].keys() - {path}:
            if seen[full][other] != value:
                raise UsageError(
                    f"{other}={seen[full][other]} and {path}={value} set one field by two names; give one of them"
                )


def in_short_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their dotted paths, short where there is a short name."""
    return {_SHORT.get(path, path): value for path, value in flat.items()}
