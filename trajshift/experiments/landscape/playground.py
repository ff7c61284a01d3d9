"""The page's playground: the same loop in JavaScript, with data from this package, as one piece of HTML."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import Any

import torch

from trajshift.algorithm.methods import METHODS
from trajshift.experiments.landscape.himmelblau import DOMAIN, VARIANTS, Landscape, tasks
from trajshift.experiments.landscape.vectorized_loop import OFFERED
from trajshift.learners.parameter_matrix import Layout
from trajshift.report.page import fill
from trajshift.rng import key, normal

STEPS = 600
"""Inner steps for which the page has the directions of random shifting; then they repeat."""
MOMENTUM = 0.9
_ROW = Layout({"theta": torch.zeros(2, dtype=torch.float64)}).size


def playground_html() -> str:
    """A piece of HTML for `Page.markup`: elements, data and script; its style is in the page's style sheet."""
    script = "\n".join(_text(name) for name in ("playground.js", "playground_draw.js", "playground_ui.js"))
    return fill(_text("playground.html.j2"), trusted=("script",), data=playground_data(), script=script)


def playground_data() -> dict[str, Any]:
    """What the script gets from Python, as JSON values: the presets and both variants of the tasks."""
    chosen = {name: METHODS[name] for name in OFFERED}
    return {
        "domain": DOMAIN,
        "methods": {
            name: {"metagrad": method.metagrad, "every": method.meta_every, "carry": method.carry}
            for name, method in chosen.items()
        },
        "landscapes": {variant: _landscape(variant) for variant in VARIANTS},
    }


def _landscape(variant: str) -> dict[str, Any]:
    landscape = tasks(variant)
    shape = landscape.shape
    return {
        "scale": shape.scale,
        "first": shape.first,
        "second": shape.second,
        "centres": landscape.centres.tolist(),
        "angles": landscape.angles.tolist(),
        "momentum": MOMENTUM,
        "directions": _directions(landscape),
    }


def _directions(landscape: Landscape) -> str:
    """Angles of the library's random directions with seed 0, `[STEPS, T]` float64 in base64 (`carries.random`)."""
    draws = [
        normal(key(0, name, "direction", step), _ROW, dtype=torch.float64)[:2]
        for step in range(1, STEPS + 1)
        for name in landscape.names
    ]
    x, y = torch.stack(draws, dim=1)
    return base64.b64encode(torch.atan2(y, x).numpy().astype("<f8").tobytes()).decode()


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
