"""The page on carries and meta-gradients of one's own runs as printed, and its classes do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.learners import image_tasks, make, run, same_bits
from trajshift import Meta
from trajshift.training.checkpoint import load, save

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def defined() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "extending"}
    for block in BLOCKS[:2]:
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_page_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile("\n".join(BLOCKS), PAGE.name, "exec"), {"__name__": "extending"})
    assert capsys.readouterr().out.split() == ["UnitDisplacement", "FadingShift"]


def test_theta_follows_a_carry_of_ones_own_and_phi_a_meta_gradient_of_ones_own() -> None:
    names = defined()
    meta = Meta(lr=0.1, gradient=names["UnitDisplacement"](), carry=names["FadingShift"]())
    own, held = (make("trajectory-shifting", image_tasks(), meta=m) for m in (meta, Meta(lr=0.1, carry="hold")))
    before = own.phi.clone()
    run(own, 1)
    run(held, 1)  # one inner step from the same phi, after which theta stays
    unit = (before - held.theta) / torch.linalg.vector_norm(before - held.theta, dim=1, keepdim=True)
    delta = -0.1 * unit.mean(0)
    torch.testing.assert_close(own.phi, before + delta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own.theta, held.theta + 0.9 * delta, rtol=1e-10, atol=1e-12)


def test_what_a_carry_keeps_survives_a_checkpoint(tmp_path: Path) -> None:
    def trainer() -> Any:
        names = defined()
        meta = Meta(lr=0.1, gradient=names["UnitDisplacement"](), carry=names["FadingShift"]())
        return make("trajectory-shifting", image_tasks(), meta=meta)

    whole, first, second = run(trainer(), 7), run(trainer(), 6), trainer()
    load(save(tmp_path, first.meta_step), second.meta_step)
    run(second, 1)
    kept = [{"left out": one.meta_step.carry.left_out, "phi": one.phi, "theta": one.theta} for one in (whole, second)]
    assert same_bits(*kept)
    assert kept[0]["left out"].any()
