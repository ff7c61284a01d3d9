"""phi and theta on quadratic tasks against closed forms in numpy, and the orders of equation 5."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.linalg import inv, matrix_power

from tests.helpers.quadratics import (
    DIMENSION,
    Affine,
    curvatures,
    gradient,
    leap,
    phi_of,
    point_tasks,
    start,
    tasks,
    theta_of,
    trainer,
    trajectory,
)
from trajshift import MetaTrainer
from trajshift.algorithm.conjugate_gradient import conjugate_gradient, hessian_product
from trajshift.algorithm.meta_gradients import MetaGradient

ALPHA, BETA, HORIZON, ROUNDS = 0.1, 0.3, 7, 3
A, C = curvatures(3)
WEIGHTS = np.array([1.0, 2.5, 0.5])


def finish(made: MetaTrainer) -> MetaTrainer:
    for _ in made:
        pass
    return made


def run(method: str, **options: object) -> MetaTrainer:
    return finish(trainer(tasks(A, C), method, **{"lr": ALPHA, "horizon": HORIZON, "rounds": ROUNDS, **options}))


def mean_of(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=0)


# -- shifting and Reptile: powers of one affine map ------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_shifting_after_every_step(weights: np.ndarray | None) -> None:
    maps = Affine(A, C, ALPHA, weights)
    made = trainer(tasks(A, C, weights), "trajectory-shifting", lr=ALPHA, meta_lr=BETA, horizon=HORIZON, rounds=ROUNDS)
    one_step = maps.meta(BETA, shift=True) @ maps.inner
    one_round = matrix_power(one_step, HORIZON) @ maps.reset
    for event in made:
        whole = matrix_power(one_round, event.round) if event.k == HORIZON else None
        done = matrix_power(one_step, event.k) @ maps.reset @ matrix_power(one_round, event.round)
        phi, theta = maps.run(done, start())
        np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12, atol=1e-13)
        if event.k < HORIZON:
            np.testing.assert_allclose(theta_of(made), theta, rtol=1e-12, atol=1e-13)
        else:  # no shift before a reset: theta is what the last inner step left
            before = maps.inner @ matrix_power(one_step, HORIZON - 1) @ maps.reset @ whole
            np.testing.assert_allclose(theta_of(made), maps.run(before, start())[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_reptile(weights: np.ndarray | None) -> None:
    maps = Affine(A, C, ALPHA, weights)
    made = trainer(tasks(A, C, weights), "reptile", lr=ALPHA, meta_lr=BETA, horizon=HORIZON, rounds=ROUNDS)
    finish(made)
    one_round = maps.meta(BETA, shift=False) @ matrix_power(maps.inner, HORIZON) @ maps.reset
    phi, theta = maps.run(matrix_power(one_round, ROUNDS), start())
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(theta_of(made), theta, rtol=1e-12, atol=1e-13)


def test_no_shifting() -> None:
    maps = Affine(A, C, ALPHA)
    one_step = maps.meta(BETA, shift=False) @ maps.inner
    one_round = matrix_power(one_step, HORIZON) @ maps.reset
    phi, theta = maps.run(matrix_power(one_round, ROUNDS), start())
    made = run("no-shifting", meta_lr=BETA)
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(theta_of(made), theta, rtol=1e-12, atol=1e-13)


def test_accurate_reads_the_exact_trajectory_from_every_phi() -> None:
    phi = start()
    made = trainer(tasks(A, C), "accurate", lr=ALPHA, meta_lr=BETA, horizon=HORIZON, rounds=ROUNDS)
    for event in made:
        phi = phi - BETA * mean_of(phi - trajectory(A, C, phi, ALPHA, event.k))
        np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12, atol=1e-13)
        if event.k < HORIZON:
            np.testing.assert_allclose(theta_of(made), trajectory(A, C, phi, ALPHA, event.k), rtol=1e-12, atol=1e-13)


# -- the FOMAML family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "last"), [("train", HORIZON - 1), ("heldout", HORIZON)])
def test_fomaml(batch: str, last: int) -> None:
    phi = start()
    for _ in range(ROUNDS):
        phi = phi - BETA * mean_of(gradient(A, C, trajectory(A, C, phi, ALPHA, last)))
    made = run("fomaml", meta_lr=BETA, batch=batch)
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("horizon", "every"), [(20, 2), (7, 1)], ids=["a tenth", "each step"])
def test_fomaml_plus_plus_accumulates_along_one_trajectory(horizon: int, every: int) -> None:
    phi = start()
    for _ in range(ROUNDS):
        ends = range(every, horizon + 1, every)
        phi = phi - BETA * sum(mean_of(gradient(A, C, trajectory(A, C, phi, ALPHA, k - 1))) for k in ends)
    made = run("fomaml++", meta_lr=BETA, horizon=horizon)
    assert made.method.meta_every == every
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-11, atol=1e-12)


# -- iMAML -----------------------------------------------------------------------------------------------------


def proximal_end(phi: np.ndarray, strength: float) -> np.ndarray:
    """theta_K of the penalised inner loss: it contracts to (A + lambda)^-1 (A c + lambda phi)."""
    rows = []
    for a, c in zip(A, C, strict=True):
        system = a + strength * np.eye(DIMENSION)
        fixed = inv(system) @ (a @ c + strength * phi)
        rows.append(fixed + matrix_power(np.eye(DIMENSION) - ALPHA * system, HORIZON) @ (phi - fixed))
    return np.stack(rows)


@pytest.mark.parametrize("batch", ["train", "heldout"])
@pytest.mark.parametrize(("strength", "damping"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.7)])
def test_imaml_solves_the_implicit_system(strength: float, damping: float, batch: str) -> None:
    phi, eye = start(), np.eye(DIMENSION)
    for _ in range(ROUNDS):
        end = proximal_end(phi, strength)
        solved = [inv((1 + damping) * eye + a / strength) @ g for a, g in zip(A, gradient(A, C, end), strict=True)]
        phi = phi - BETA * mean_of(np.stack(solved))
    options = {"strength": strength, "damping": damping, "steps": 20, "tolerance": 1e-13}
    made = run("imaml", meta_lr=BETA, batch=batch, metagrad_options=options)
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(theta_of(made), end, rtol=1e-9, atol=1e-10)


def test_conjugate_gradients_stop_at_the_tolerance_or_at_the_last_product() -> None:
    eigenvalues = torch.logspace(0, 3, 40, dtype=torch.float64)
    b = torch.ones(40, dtype=torch.float64)
    used = []
    for tolerance in (1e-1, 1e-4, 1e-8):
        found = conjugate_gradient(lambda v: eigenvalues * v, b, steps=500, tolerance=tolerance)
        assert torch.linalg.vector_norm(b - eigenvalues * found.x) <= tolerance * torch.linalg.vector_norm(b) * 1.01
        assert found.negative_curvature == 0
        used.append(found.steps)
    assert used[0] < used[1] < used[2] < 500
    assert conjugate_gradient(lambda v: eigenvalues * v, b, steps=3, tolerance=0.0).steps == 3
    nothing = conjugate_gradient(lambda v: v, torch.zeros(3), steps=3, tolerance=1e-6)
    assert nothing.steps == 0
    assert not nothing.x.any()


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    diagonal = torch.tensor([1.0, -0.5], dtype=torch.float64)
    b = torch.tensor([1.0, 0.1], dtype=torch.float64)
    found = conjugate_gradient(lambda v: diagonal * v, b, steps=9, tolerance=1e-9)
    assert (found.steps, found.negative_curvature) == (2, 1)
    torch.testing.assert_close(found.x, (b @ b) / (b @ (diagonal * b)) * b)
    at_once = conjugate_gradient(lambda v: -v, b, steps=9, tolerance=1e-9)
    assert (at_once.steps, at_once.negative_curvature) == (1, 1)
    torch.testing.assert_close(at_once.x, b)


def test_imaml_counts_indefinite_hessians() -> None:
    saddles = A.copy()
    saddles[:2] -= 40 * np.eye(DIMENSION)
    options = {"steps": 10, "tolerance": 1e-12}
    made = trainer(tasks(saddles, C), "imaml", lr=1e-3, horizon=2, rounds=ROUNDS, metagrad_options=options)
    finish(made)
    assert made.metrics()["negative_curvature"] == 2 * ROUNDS
    assert np.isfinite(phi_of(made)).all()
    # Two tasks give their gradient, as one product showed that their system has no minimum; the third is solved.
    assert made.metrics()["cg_steps"] > 2 * ROUNDS


def test_hessian_products_of_a_net_equal_its_hessian() -> None:
    torch.manual_seed(0)
    sizes = (12, 3)
    x = torch.randn(6, 4, dtype=torch.float64)
    flat = torch.randn(sum(sizes), dtype=torch.float64)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        first, second = weights.split(sizes)
        return (torch.tanh(x @ first.view(4, 3)) @ second).square().mean()

    parameters = [piece.clone().requires_grad_() for piece in flat.split(sizes)]
    product = hessian_product(loss(torch.cat(parameters)), parameters, lambda v: v.split(sizes))
    dense = torch.autograd.functional.hessian(loss, flat)
    v = torch.randn(sum(sizes), dtype=torch.float64)
    torch.testing.assert_close(product(v), dense @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(2 * v), 2 * dense @ v, rtol=1e-12, atol=1e-12)


# -- Leap ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.9], ids=["losses fall", "losses rise too"])
@pytest.mark.parametrize("stabilizer", [True, False])
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_leap(norm: bool, loss: bool, stabilizer: bool, alpha: float) -> None:
    phi = start()
    for _ in range(ROUNDS):
        path = [trajectory(A, C, phi, alpha, k) for k in range(HORIZON + 1)]
        segments = list(pairwise(path))
        direction = leap(A, C, segments, power=1 if norm else 2, loss=loss, stabilizer=stabilizer)
        phi = phi - 0.01 * mean_of(direction)
    options = {"norm": norm, "loss": loss, "stabilizer": stabilizer}
    made = run("leap", lr=alpha, meta_lr=0.01, metagrad_options=options)
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-10, atol=1e-11)


def test_leaps_stabilizer_matters_where_losses_rise() -> None:
    ends = [
        phi_of(finish(trainer(tasks(A, C), "leap", lr=0.9, horizon=5, rounds=1, metagrad_options={"stabilizer": on})))
        for on in (True, False)
    ]
    assert not np.allclose(*ends)


# -- equation 5 ------------------------------------------------------------------------------------------------


class Prescribed(MetaGradient):
    """A meta-gradient of norm one that does not depend on the trajectories."""

    def read(self, probe):
        direction = torch.zeros_like(probe.theta)
        direction[:, :DIMENSION] = DIMENSION**-0.5
        return direction


def approximation_error(alpha: float, beta: float, k: int, metagrad: object) -> float:
    """||U_k(phi + d_1 + ... + d_{k-1}) - shifted theta_k|| on one smooth loss that is not quadratic."""
    a = A[0] / np.linalg.norm(A[0], 2)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        away = theta - torch.from_numpy(C[0])
        return away @ torch.from_numpy(a) @ away / 2 + 0.1 * away.sin().sum()

    made = trainer(
        point_tasks([loss]), "trajectory-shifting", lr=alpha, meta_lr=beta, horizon=k + 1, rounds=1, metagrad=metagrad
    )
    for event in made:
        if event.k == k - 1:
            exact = phi_of(made)  # the initialization that theta_k is meant for
        if event.k == k:
            shifted = theta_of(made)[0] - (phi_of(made) - exact)  # undoes the k-th shift
            break
    for _ in range(k):
        away = exact - C[0]
        exact = exact - alpha * (a @ away + 0.1 * np.cos(away))
    return float(np.linalg.norm(exact - shifted))


def slope(xs: list[float], errors: list[float]) -> float:
    return float(np.polyfit(np.log(xs), np.log(errors), 1)[0])


@pytest.mark.parametrize(
    ("metagrad", "orders"),
    [(Prescribed, {"beta": 1, "alpha": 1, "k": 2}), (None, {"beta": 1, "alpha": 2, "k": 3})],
    ids=["prescribed shifts", "displacement"],
)
def test_orders_of_the_approximation_error(metagrad: type | None, orders: dict[str, int]) -> None:
    base = {"alpha": 1e-4, "beta": 1e-4, "k": 64}
    ranges = {"beta": [1e-5, 1e-4, 1e-3], "alpha": [1e-5, 3e-5, 1e-4], "k": [32, 64, 128]}
    for name, order in orders.items():
        errors = [
            approximation_error(**base | {name: x}, metagrad=metagrad() if metagrad else None) for x in ranges[name]
        ]
        assert slope(ranges[name], errors) == pytest.approx(order, abs=0.06), name


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_overlapped_shift_comes_one_inner_step_late(every: int) -> None:
    """By hand: the mean displacement read after step s moves phi and theta after step s + 1; a round ends with both."""
    made = trainer(
        tasks(A, C), "trajectory-shifting",
        lr=ALPHA, meta_lr=BETA, horizon=6, rounds=ROUNDS, meta_every=every, overlap=True,
    )  # fmt: skip
    phi = start()
    for _ in range(ROUNDS):
        theta, late = np.tile(phi, (3, 1)), None
        for k in range(1, 7):
            theta = theta - ALPHA * np.einsum("tij,tj->ti", A, theta - C)
            if late is not None:
                phi, theta, late = phi + late, theta + late, None
            if k % every == 0:
                late = BETA * (theta - phi).mean(0)
            if k == 6 and late is not None:
                phi = phi + late
            made.advance()
            np.testing.assert_allclose(phi_of(made), phi, rtol=1e-12)
            if k < 6:
                np.testing.assert_allclose(theta_of(made), theta, rtol=1e-12)


def test_what_being_late_does_to_the_fixed_point() -> None:
    """The lag is one step of a trajectory: it moves the fixed point by a few percent of the way there."""
    ends = [phi_of(run("trajectory-shifting", meta_lr=0.1, rounds=300, overlap=overlap)) for overlap in (False, True)]
    moved = np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[0] - start())
    assert 0.0 < moved < 0.05
