"""The rates that sweeps chose, for the runs of an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError

_RATES = ("meta_lr", "meta", "metagrad_options", "inner")
"""Fields and sections that are taken from a sweep; whatever else it varied or set is ignored."""
_AGAIN = "sweep again with method=A,B,... among the fields"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What one or several sweeps chose."""

    rates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Method -> overrides."""
    notes: tuple[str, ...] = ()
    """A sentence for each rate at an edge of its grid."""


def read_tuned(files: Sequence[Path], recipe: str, horizon: int) -> Tuned:
    """The rates (fields and sections of `_RATES`) in the sweep.json of sweeps over `method` and other fields.

    Raises:
        UsageError: no such file, one without a choice for each method, a sweep of another recipe or at another horizon,
            or a method that two files choose for.
    """
    rates: dict[str, tuple[str, ...]] = {}
    notes = []
    for file in files:
        summary = _read(file, recipe)
        for method, point in summary["choice"].items():
            if method in rates:
                raise UsageError(f"{file} chooses for {method}, as an earlier file does; leave one of them out")
            tuned_at = point.get("horizon", summary["horizon"])
            if str(tuned_at) != str(horizon):
                raise UsageError(
                    f"{file} chooses for {method} at horizon {tuned_at}, and this scale has {horizon}; a rate tuned at "
                    f"one says little about another, so sweep with horizon={horizon}"
                )
            used = [name for name in point if name.partition(".")[0] in _RATES]
            rates[method] = tuple(f"{name}={point[name]}" for name in used)
            at_edge = [text for text in summary["edges"].get(method, ()) if text.partition("=")[0] in used]
            notes += [f"{method}: in the sweep, {text}; trajshift sweep --extend does" for text in at_edge]
    return Tuned(rates=rates, notes=tuple(notes))


def _read(file: Path, recipe: str) -> dict[str, Any]:
    """One sweep.json, its parts checked."""
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        parts = {name: summary[name] for name in ("recipe", "horizon", "choice", "edges")}
        parts["choice"] = {method: dict(point) for method, point in parts["choice"].items()}
        parts["edges"] = {method: [str(text) for text in texts] for method, texts in parts["edges"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not a readable sweep.json ({type(error).__name__}: {error}); {_AGAIN}") from None
    if not parts["choice"] or "" in parts["choice"]:
        raise UsageError(f"{file} has no choice for each method; {_AGAIN}")
    if parts["recipe"] != recipe:
        raise UsageError(f"{file} is a sweep of recipe {parts['recipe']!r}, and this experiment's is {recipe!r}")
    return parts
