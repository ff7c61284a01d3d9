"""The plane of section 4.1: the tasks, the quality of points, and the vectorised twin against the core's loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.options import build
from trajshift import Inner, UsageError
from trajshift.algorithm.methods import METHODS
from trajshift.experiments.landscape import OFFERED, fates, grid, quality_map, run, stack, tasks, template, updates
from trajshift.experiments.landscape.himmelblau import ANGLES, VARIANTS, Point
from trajshift.experiments.landscape.resting import clusters, optima

STARTS = torch.tensor([[0.0, 10.0], [4.0, 4.5], [9.5, 1.0]], dtype=torch.float64)
MINIMA = ((3.0, 2.0), (-2.805118086952745, 3.131312518250573), (-3.779310253377747, -3.283185991286170),
          (3.584428340330492, -1.848126526964404))  # fmt: skip


def trained(method: str, start: Tensor, *, horizon: int, rounds: int, **options: Any) -> tuple[Tensor, list[int]]:
    """phi `[U+1, 2]` and inner steps after every meta-update of the core's own loop."""
    landscape = tasks()
    trainer = build(
        Point, landscape.as_tasks(), method, horizon=horizon, rounds=rounds, meta_lr=0.1, batch_size=1,
        shared=("theta",), renew=["optimizer"], inner=Inner(lr=0.05, options={"momentum": 0.9}),
        initialization={"theta": start}, **options,
    )  # fmt: skip
    phi, steps = [start], [0]
    for event in trainer:
        if event.meta_updated:
            phi.append(trainer.initialization["theta"])
            steps.append(event.inner_steps)
    return torch.stack(phi), steps


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_published_tasks_have_the_values_of_the_formula_worked_by_hand() -> None:
    landscape = tasks()
    assert len(landscape) == 8
    centres = landscape.centres.tolist()
    assert centres[0] == pytest.approx([5.0, 12.0])
    assert centres[2] == pytest.approx([12.0, 5.0])
    # task 0 at its centre: u = v = 0, so 0.73845121 * 121 + 0.9954126 * 49
    assert landscape.losses([[5.0, 12.0]])[0, 0].item() == pytest.approx(138.1278138)
    # task 2 at (12, 8): v = cos(4.41522871) = -0.29281527, u = -sin(4.41522871) = 0.95616906 (3 to the right / 3)
    u, v = 0.956169, -0.292815
    by_hand = 0.73845121 * (u * u + v - 11) ** 2 + 0.9954126 * (u + v * v - 7) ** 2
    assert landscape.losses([[12.0, 8.0]])[2, 0].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_himmelblaus_minima_mapped_back_are_zeros_of_every_task(variant: str) -> None:
    landscape, scale = tasks(variant), VARIANTS[variant].scale
    for t, (centre, angle) in enumerate(zip(landscape.centres.tolist(), ANGLES, strict=True)):
        cos, sin = math.cos(angle), math.sin(angle)
        points = [
            [centre[0] + scale * (cos * u + sin * v), centre[1] + scale * (-sin * u + cos * v)] for u, v in MINIMA
        ]
        assert landscape.losses(points)[t].abs().max().item() < 1e-20


def test_the_printed_template_is_the_formula_of_the_text() -> None:
    x, y = grid(11).T
    printed = ((x**2 - 10 * x + y + 9) ** 2 + (x + y**2 - 10 * y + 13) ** 2) / 3
    torch.testing.assert_close(template(grid(11), "printed"), printed, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_autograd_on_the_slow_losses(variant: str) -> None:
    landscape = tasks(variant, seed=4)
    fast, losses = landscape.gradients(STARTS), landscape.losses(STARTS)
    for t, task in enumerate(landscape.as_tasks()):
        for n, start in enumerate(STARTS):
            point = Point()
            point.theta.data = start.clone()
            assert task.loss is not None
            loss = task.loss(point, None)
            loss.backward()
            torch.testing.assert_close(losses[t, n], loss.detach(), rtol=1e-12, atol=0.0)
            torch.testing.assert_close(fast[t, n], point.theta.grad, rtol=1e-11, atol=1e-11)


def test_random_sets_are_seeded_and_stack() -> None:
    assert torch.equal(tasks(seed=3).angles, tasks(seed=3).angles)
    assert not torch.equal(tasks(seed=3).angles, tasks(seed=4).angles)
    both = stack([tasks(), tasks(seed=4)])
    assert both.sets == (2,)
    torch.testing.assert_close(both.losses(STARTS)[:, 1], tasks(seed=4).losses(STARTS))
    alone = run("random-shifting", STARTS, tasks=tasks(seed=4), horizon=5)
    stacked = run("random-shifting", STARTS, tasks=both, horizon=5)
    torch.testing.assert_close(stacked.phi[:, 1], alone.phi)
    torch.testing.assert_close(
        quality_map(stacked.phi[-1], 4, 0.1, tasks=both)[1], quality_map(alone.phi[-1], 4, 0.1, tasks=tasks(seed=4))
    )


# -- quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_quality_is_that_of_torch_optim_run_per_point_and_task(name: str, kind: type[torch.optim.Optimizer]) -> None:
    steps, lr = 12, 0.1 if name == "adam" else 0.01
    curves = np.zeros((len(STARTS), steps))
    for task in tasks().as_tasks():
        for n, start in enumerate(STARTS):
            point = Point()
            point.theta.data = start.clone()
            optimizer = kind(point.parameters(), lr=lr)
            for k in range(steps):
                optimizer.zero_grad()
                assert task.loss is not None
                loss = task.loss(point, None)
                curves[n, k] += loss.item() / 8
                loss.backward()
                optimizer.step()
    found = quality_map(STARTS.numpy(), steps, lr, name)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), curves, rtol=1e-9)


# -- the twin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OFFERED)
def test_the_twin_is_the_loop(method: str) -> None:
    found = run(method, STARTS, horizon=7, rounds=3)
    assert found.phi.dtype == torch.float64
    for n, start in enumerate(STARTS):
        phi, steps = trained(method, start, horizon=7, rounds=3)
        assert found.inner_steps.tolist() == steps
        torch.testing.assert_close(found.phi[:, n], phi, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "choices"),
    [
        ("leap", {"carry": "shift", "meta_every": 2}),
        ("reptile", {"carry": "replay", "meta_every": 4}),
        ("fomaml", {"batch": "heldout"}),
        ("reptile", {"carry": "random", "meta_every": 2}),
    ],
)
def test_mixes_of_the_four_choices_are_those_of_the_loop(method: str, choices: dict[str, Any]) -> None:
    found = run(method, STARTS[:1], horizon=8, rounds=2, **choices)
    phi, steps = trained(method, STARTS[0], horizon=8, rounds=2, **choices)
    assert found.inner_steps.tolist() == steps
    torch.testing.assert_close(found.phi[:, 0], phi, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("method", ["trajectory-shifting", "reptile"])
def test_the_twin_is_the_loop_at_the_papers_horizon(method: str) -> None:
    phi, _ = trained(method, STARTS[1], horizon=100, rounds=2)
    torch.testing.assert_close(run(method, STARTS[1:2], rounds=2).phi[:, 0], phi, rtol=0.0, atol=1e-9)


def test_published_optima_at_the_long_horizon_are_87_points_in_13_clusters() -> None:
    found = optima(100)
    assert (len(found.points), found.cluster_count) == (87, 13)
    assert sum(found.fates.values()) == 41 * 41
    assert found.fates["settled"] == 87
    assert found.fates["unfinished"] == 0
    assert len(optima(5).clusters.unique()) < 13


def test_clusters_are_chains_of_neighbours() -> None:
    points = [[0.0, 0.0], [3.0, 0.0], [0.04, 0.0], [0.08, 0.0], [3.0, 0.03]]
    assert clusters(torch.tensor(points), 0.05).tolist() == [0, 1, 0, 0, 1]
    assert len(clusters(torch.zeros(0, 2), 0.05)) == 0


def test_replays_are_counted() -> None:
    assert run("accurate", STARTS, horizon=4, rounds=2).inner_steps.tolist() == [0, 2, 5, 9, 10, 12, 15, 19, 20]


def test_starts_that_diverge_are_counted_and_disturb_no_other() -> None:
    starts = torch.cat((STARTS, torch.tensor([[-5.0, -5.0], [15.0, 15.0]], dtype=torch.float64)))
    found = run("trajectory-shifting", starts, tasks=tasks("printed"), inner_lr=5e-5)
    alone = run("trajectory-shifting", STARTS, tasks=tasks("printed"), inner_lr=5e-5)
    assert torch.equal(found.phi[:, :3], alone.phi)
    wild = run("trajectory-shifting", starts, tasks=tasks("printed"))
    assert fates(wild.phi).overflowed == 5
    assert not quality_map(wild.phi[-1], 3, 0.1).isfinite().any()
    away = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [[1.0, 16.0], [2.0, math.inf], [3.0, 3.0]]])
    assert fates(away) == (1, 1, 1)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(OFFERED)))
def test_methods_without_a_meaning_here_are_refused(method: str) -> None:
    with pytest.raises(UsageError, match=f"method {method} is not available here: .*; use one of trajectory-shifting"):
        updates(method, STARTS)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: run("reptil", STARTS), "unknown method 'reptil'; did you mean 'reptile'"),
        (lambda: run("reptile", STARTS, horizon=0), "horizon is 0"),
        (lambda: run("reptile", STARTS, rounds=0), "rounds is 0; use at least 1"),
        (lambda: run("reptile", STARTS, meta_lr=-1.0), "meta_lr is -1.0; use a positive number"),
        (lambda: run("reptile", STARTS, inner_lr=math.inf), "inner_lr is inf; use a positive number"),
        (lambda: run("reptile", STARTS, momentum=1.0), "momentum is 1.0; use a number from 0 to below 1"),
        (lambda: run("reptile", STARTS[0]), r"starts have the shape \[2\]; pass \[N, 2\]"),
        (lambda: run("reptile", STARTS / 0), "3 of 3 starts are not finite; leave them out"),
        (lambda: run("reptile", STARTS.expand(5, 3, 2)), r"\[5, 3, 2\], but \[\] sets of tasks are stacked"),
        (lambda: quality_map(STARTS, 0, 0.1), "steps is 0; use at least 1"),
        (lambda: quality_map(STARTS, 2, 0.0), "lr is 0.0; use a positive number"),
        (lambda: quality_map(STARTS, 2, 0.1, "adamw"), "unknown optimizer 'adamw'; did you mean 'adam'"),
        (lambda: tasks("publish"), "unknown variant 'publish'; did you mean 'published'"),
        (lambda: stack([]), "0 sets of tasks cannot be stacked"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        call()
