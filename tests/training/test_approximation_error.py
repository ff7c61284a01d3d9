"""The gauge against closed forms, and that it changes nothing; carries of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import quadratics, toys
from trajshift import Inner, MetaTrainer, UsageError
from trajshift.algorithm.carries import Carry
from trajshift.algorithm.meta_gradients import MetaGradient
from trajshift.algorithm.protocols import CarryView, MetaGradientView
from trajshift.training import checkpoint
from trajshift.training.approximation_error import ApproximationErrorMeter

ALPHA, K = 0.1, 9


class Given(MetaGradient):
    """phi moves by shifts known beforehand, with meta_lr 1."""

    def __init__(self, shifts: np.ndarray) -> None:
        self.shifts = torch.from_numpy(shifts)

    def begin(self, theta: Tensor) -> None:
        self.k = 0

    def observe(self, theta: Tensor, losses: Tensor, gradients: Tensor) -> None:
        self.k += 1

    def read(self, view: MetaGradientView) -> Tensor:
        row = torch.zeros_like(view.phi)
        row[: quadratics.DIMENSION] = -self.shifts[self.k - 1]
        return row.expand_as(view.theta)


def test_it_reads_the_closed_form_on_quadratics() -> None:
    """theta's error is sum_{i<k} (J^k - J^(k-i)) d_i with J = I - alpha A, for any shifts d_1, d_2, ..."""
    a, c = quadratics.curvatures(3)
    shifts = 0.1 * np.random.default_rng(4).standard_normal((K, quadratics.DIMENSION))
    gauge = ApproximationErrorMeter(lambda k: True, every_task=True)
    made = quadratics.trainer(
        quadratics.tasks(a, c), "trajectory-shifting",
        lr=ALPHA, horizon=K, rounds=1, metagrad=Given(shifts), meta_lr=1.0, error_meter=gauge,
    )  # fmt: skip
    for _ in made:
        pass
    rows = gauge.take()
    assert [(row["k"], row["task"]) for row in rows] == [(k, f"q{t}") for k in range(1, K + 1) for t in range(3)]
    phi = quadratics.start()
    for row in rows:
        k, matrix = row["k"], a[int(row["task"][1:])]
        centre = c[int(row["task"][1:])]
        jacobian = np.eye(len(matrix)) - ALPHA * matrix
        power = [np.linalg.matrix_power(jacobian, n) for n in range(k + 1)]
        error = sum((power[k] - power[k - i]) @ shifts[i - 1] for i in range(1, k))
        moved = phi + shifts[: k - 1].sum(0)
        theta = centre + power[k] @ (moved - centre) - error
        assert row["error"] == pytest.approx(np.linalg.norm(error), abs=1e-12)
        assert row["distance"] == pytest.approx(np.linalg.norm(theta - moved), rel=1e-12)
    assert gauge.take() == []


def run(gauge: ApproximationErrorMeter | None, method: str, **options: object) -> MetaTrainer:
    made = toys.trainer(toys.tasks(3), method, error_meter=gauge, **options)
    toys.run(made, made.total_steps)
    return made


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("trajectory-shifting", {}),
        ("trajectory-shifting", {"inner": Inner(optimizer="adam", lr=0.01, schedule="cosine")}),
        ("trajectory-shifting", {"inner": Inner(lr=0.05, options={}, flat=True), "metagrad": "last_gradient"}),
        ("leap", {"carry": "shift", "meta_every": 2}),
        ("no-shifting", {"renew": ("optimizer", "statistics")}),
        ("accurate", {}),
        ("mtl", {}),
    ],
)
def test_it_changes_no_bit_of_the_run(method: str, options: dict[str, object]) -> None:
    bare, gauged = (
        run(None, method, **options),
        run(ApproximationErrorMeter(lambda k: k != 2, every_task=True), method, **options),
    )
    assert torch.equal(bare.phi, gauged.phi)
    assert torch.equal(bare.theta, gauged.theta)
    for left, right in zip(bare.learners, gauged.learners, strict=True):
        mine, yours = left.state()[0], right.state()[0]
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    extra = ("approximation_errors", "gauge_evaluations")
    assert {key: value for key, value in gauged.metrics().items() if key not in extra} == bare.metrics()


def test_a_replayed_trajectory_has_no_error_and_a_held_one_has() -> None:
    errors = {}
    for method in ("accurate", "trajectory-shifting", "no-shifting", "reptile"):
        made = run(ApproximationErrorMeter(lambda k: True, every_task=True), method)
        rows = made.metrics()["approximation_errors"]
        assert made.metrics()["gauge_evaluations"] == 3 * toys.ROUNDS * sum(range(1, toys.HORIZON + 1))
        errors[method] = max(row["error"] for row in rows)
        assert max(row["error"] for row in rows if row["k"] == 1) < 1e-12
    assert errors["accurate"] < 1e-12
    assert errors["reptile"] < 1e-12
    assert errors["no-shifting"] > errors["trajectory-shifting"] > 1e-4


def test_one_task_in_turn() -> None:
    gauge = ApproximationErrorMeter.every(2, toys.HORIZON)
    made = toys.trainer(toys.tasks(2), error_meter=gauge)
    toys.run(made, made.total_steps)
    said = [(row["step"], row["k"], row["task"]) for row in gauge.take()]
    assert said == [(2, 2, "t0"), (4, 4, "t0"), (6, 2, "t1"), (8, 4, "t1"), (10, 2, "t0"), (12, 4, "t0")]
    assert made.metrics()["gauge_evaluations"] == 3 * (2 + 4)


@pytest.mark.parametrize("steps", [0, toys.HORIZON + 1])
def test_a_cadence_outside_the_round_is_refused(steps: int) -> None:
    with pytest.raises(UsageError, match=f"error_every is {steps}; .* from 1 to the horizon, {toys.HORIZON}"):
        ApproximationErrorMeter.every(steps, toys.HORIZON)


class Half(Carry):
    """theta moves by half of delta, and by a quarter of all deltas of the round so far."""

    def begin(self, view: CarryView) -> None:
        self.total = torch.zeros_like(view.theta)

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        self.total += delta
        view.theta.add_(0.5 * delta + 0.25 * self.total)

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def load(self, state: dict[str, Tensor]) -> None:
        self.total = state["total"]


@pytest.mark.parametrize("step", [5, 7, 8])
def test_readings_and_a_carry_of_ones_own_survive_a_checkpoint(tmp_path: Path, step: int) -> None:
    def make() -> MetaTrainer:
        return toys.trainer(toys.tasks(3), carry=Half(), error_meter=ApproximationErrorMeter.every(1, toys.HORIZON))

    whole, first, second = make(), make(), make()
    toys.run(whole, whole.total_steps)
    toys.run(first, step)
    checkpoint.load(checkpoint.save(tmp_path, first.meta_step), second.meta_step)
    toys.run(second, second.total_steps)
    assert torch.equal(whole.phi, second.phi)
    assert torch.equal(whole.theta, second.theta)
    assert whole.metrics() == second.metrics()


def test_a_carry_of_ones_own_does_what_it_says() -> None:
    """Half a shift of a quadratic, against numbers worked out step by step."""
    a, c = quadratics.curvatures(2)
    beta = 0.3
    made = quadratics.trainer(
        quadratics.tasks(a, c), "trajectory-shifting", lr=ALPHA, horizon=4, rounds=1, meta_lr=beta, carry=Half()
    )
    phi = quadratics.start()
    theta, total = np.stack([phi, phi]), np.zeros_like(phi)
    for k in range(1, 5):
        made.advance()
        theta = theta - ALPHA * quadratics.gradient(a, c, theta)
        delta = -beta * (phi - theta.mean(0))
        phi, total = phi + delta, total + delta
        if k < 4:
            theta = theta + 0.5 * delta + 0.25 * total
        np.testing.assert_allclose(quadratics.phi_of(made), phi, rtol=1e-12)
        np.testing.assert_allclose(quadratics.theta_of(made), theta, rtol=1e-12)
    assert made.method.carry == "Half"


def test_a_carry_that_only_the_base_defines_is_refused() -> None:
    with pytest.raises(UsageError, match="Carry defines no __call__"):
        toys.run(toys.trainer(toys.tasks(1), carry=Carry()), 1)


def test_a_carry_of_ones_own_has_no_place_in_joint_training() -> None:
    with pytest.raises(UsageError, match="carry Half with adapt head"):
        toys.trainer(toys.tasks(2), "mtl", carry=Half())


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., MetaTrainer]:
    from trajshift.recipes.build_trainer import build_trainer
    from trajshift.recipes.recipe import load

    def make(*overrides: str) -> MetaTrainer:
        return build_trainer(load("digits", ["threads=1", "horizon=4", "rounds=1", "batch_size=4", *overrides]))

    return make


def test_recipes_name_a_gauge_and_a_carry(trained: Callable[..., MetaTrainer]) -> None:
    made = trained(
        "output.error_every=2", "carry=tests.training.test_approximation_error:Half", "train_on=[upright,parity]"
    )
    assert isinstance(made.meta_step.carry, Half)
    for _ in made:
        pass
    assert [row["k"] for row in made.metrics()["approximation_errors"]] == [2, 4]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("output.error_every=0", "output: error_every is 0; it must be at least 1 step"),
        ("output.error_every=5", "output.error_every is 5, longer than a round of 4 inner steps"),
        ("carry=shifty", "unknown carry 'shifty'; did you mean 'shift'"),
        ("carry=tests.training.test_approximation_error:run", "could not be called without arguments"),
        ("carry=builtins:dict", "returned a dict; return a trajshift.Carry"),
        (
            "carry=tests.training.test_approximation_error:nothing",
            "'tests.training.test_approximation_error' has no 'nothing'",
        ),
    ],
)
def test_wrong_input_is_one_sentence(trained: Callable[..., MetaTrainer], override: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace(".", r"\.")):
        trained(override)
