"""Dotted names: fields of a recipe, parameters of a module."""

from __future__ import annotations

from collections.abc import Iterable


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name is one of `parts` or is inside one: `data.root` is inside `data`, `database` is not."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)
