"""The approximation-error experiment against closed forms, made-up power laws and plain loops."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import quadratics, toys
from trajshift import Inner, MetaTrainer, UsageError
from trajshift.cli.main import main
from trajshift.experiments.approximation import experiment, shifts
from trajshift.experiments.approximation.experiment import SETTINGS, UNITS, run_experiment
from trajshift.experiments.approximation.measure import Laboratory, Prescribed, _norm_of_hessian
from trajshift.experiments.approximation.measurement_plan import (
    MeasurementPlan,
    Setting,
    chosen_recipe,
    key_of,
    networks,
)
from trajshift.experiments.approximation.presentation import _kinks, _slope_table
from trajshift.experiments.approximation.quadratic import _errors, closed_form_check
from trajshift.experiments.approximation.summary import CORRECTED, comparisons, measured, slopes
from trajshift.training import checkpoint
from trajshift.training.approximation_error import ApproximationErrorMeter

ALPHA, MU = 0.02, 0.9
TINY = MeasurementPlan(alphas=(0.01, 0.02), betas=(0.01, 0.02), ks=(2, 10, 12), draws=2, carries=("shift", "velocity"))


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, MU])
def test_the_closed_form_is_what_two_plain_loops_differ_by(mu: float) -> None:
    generator = np.random.default_rng(1)
    root = generator.standard_normal((4, 4))
    a, shift = root @ root.T / 4, 0.1 * generator.standard_normal((12, 4))
    start = generator.standard_normal(4)

    def trajectory(phi: np.ndarray, k: int, moved: np.ndarray) -> np.ndarray:
        theta, velocity = phi.copy(), np.zeros(4)
        for i in range(k):
            velocity = mu * velocity + a @ theta
            theta = theta - ALPHA * velocity
            if i < k - 1:
                theta = theta + moved[i]
        return theta

    expected = []
    for k in range(2, 13):
        exact = trajectory(start + shift[: k - 1].sum(0), k, np.zeros_like(shift))
        expected.append(np.linalg.norm(exact - trajectory(start, k, shift)))
    np.testing.assert_allclose(_errors(a, shift, ALPHA, mu), expected, rtol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_loop_measures_the_closed_form(momentum: float) -> None:
    found = closed_form_check(momentum=momentum, horizon=20)
    assert found.exact.shape == (19,)
    assert found.ks[0] == 2
    assert found.ks[-1] == 20
    assert len(found.ks) >= 10
    assert found.exact.min() > 1e-5
    assert found.deviation < 1e-10


def on_quadratics(carry: Any, *, steps: int, momentum: float = MU, alpha: float = ALPHA) -> MetaTrainer:
    """A trajectory of 40 steps on two quadratics, taken `steps` far; phi moves by a fixed shift."""
    given = torch.zeros(40, 32, dtype=torch.float64)  # a row is padded to 256 bytes
    given[:, : quadratics.DIMENSION] = 0.1
    made = quadratics.trainer(
        quadratics.tasks(*quadratics.curvatures(2)), "trajectory-shifting",
        horizon=40, rounds=1, meta_lr=1.0, carry=carry, metagrad=Prescribed(given),
        inner=Inner(lr=alpha, options={"momentum": momentum}),
        error_meter=ApproximationErrorMeter(lambda k: True, every_task=True),
    )  # fmt: skip
    for _ in range(steps):
        made.advance()
    return made


def test_prescribed_shifts_move_phi_by_just_that() -> None:
    made = on_quadratics("shift", steps=7)
    np.testing.assert_allclose(quadratics.phi_of(made), quadratics.start() + 7 * 0.1, rtol=1e-12)


def differences(carry: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and what the carry's first correction, after step 10, does to theta and velocity beside the identity."""
    plain, other = on_quadratics("shift", steps=10), on_quadratics(carry, steps=10)
    velocities = [
        np.stack(
            [learner.optimizer.state[learner.shared["theta"]]["momentum_buffer"].numpy() for learner in m.learners]
        )
        for m in (plain, other)
    ]
    a, _ = quadratics.curvatures(2)
    return a, quadratics.theta_of(other) - quadratics.theta_of(plain), velocities[1] - velocities[0]


def geometric(mu: float, k: int) -> float:
    return sum(mu**i for i in range(k))


def test_velocity_shift_adds_what_the_velocity_is_missing() -> None:
    """Of the shift after step j, c_j H d: mu^(10-j) of it is still velocity, what was shed has moved theta."""
    a, theta, velocity = differences(shifts.VelocityShift())
    curved = np.einsum("tij,j->ti", a, np.full(quadratics.DIMENSION, 0.1))
    still = sum(MU ** (10 - j) * geometric(MU, j) for j in range(1, 11))
    shed = sum(MU * geometric(MU, 10 - j) * geometric(MU, j) for j in range(1, 11))
    np.testing.assert_allclose(velocity, still * curved, rtol=1e-9)
    np.testing.assert_allclose(theta, limited(-ALPHA * shed * curved), rtol=1e-9)


def test_tangent_shift_also_contracts_theta_to_first_order() -> None:
    """The shift after step j lacks alpha (c_1 + ... + c_j) H d."""
    a, theta, _ = differences(shifts.TangentShift())
    curved = np.einsum("tij,j->ti", a, np.full(quadratics.DIMENSION, 0.1))
    shed = sum(MU * geometric(MU, 10 - j) * geometric(MU, j) for j in range(1, 11))
    missing = sum(geometric(MU, i) for j in range(1, 11) for i in range(1, j + 1))
    np.testing.assert_allclose(theta, limited(-ALPHA * (shed + missing) * curved), rtol=1e-9)


def limited(correction: np.ndarray) -> np.ndarray:
    """At most as long as the ten shifts."""
    longest = 10 * np.linalg.norm(np.full(quadratics.DIMENSION, 0.1))
    return correction * np.minimum(longest / np.linalg.norm(correction, axis=1, keepdims=True), 1.0)


def test_scalar_shift_contracts_by_the_curvature_along_the_shift() -> None:
    made = on_quadratics(shifts.ScalarShift(), steps=20)
    a, _ = quadratics.curvatures(2)
    direction = np.ones(quadratics.DIMENSION)
    along = np.einsum("i,tij,j->t", direction, a, direction) / (direction @ direction)
    expected = ALPHA * sum(geometric(MU, k) for k in range(1, 21)) * along
    np.testing.assert_allclose(made.meta_step.carry.state()["exponents"].numpy(), expected, rtol=1e-9)
    # 20 inner steps of 2 tasks, 2 products of each (a pass and two evaluations a product)
    assert made.meta_step.counters.counts["gradient_evaluations"] == 2 * (20 + 2 * 3)


def test_diagonal_shift_contracts_by_squared_gradients() -> None:
    made = on_quadratics(shifts.DiagonalShift(), steps=12, momentum=0.0)
    a, c = quadratics.curvatures(2)
    theta, exponents = np.stack([quadratics.start()] * 2), np.zeros((2, quadratics.DIMENSION))
    for _ in range(12):
        gradient = quadratics.gradient(a, c, theta)
        exponents += ALPHA * 4 * gradient**2  # batches of 4
        theta = theta - ALPHA * gradient + np.exp(-exponents) * 0.1
    np.testing.assert_allclose(quadratics.theta_of(made), theta, rtol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, MU])
def test_a_first_order_correction_leaves_a_second_order_error(momentum: float) -> None:
    """With the learning rate halved the identity's error halves, and that of the tangent falls to about a quarter."""
    errors: dict[tuple[str, float], float] = {}
    for alpha in (0.0004, 0.0002):
        for name, carry in (("shift", "shift"), ("tangent", shifts.TangentShift())):
            made = on_quadratics(carry, steps=11, momentum=momentum, alpha=alpha)
            assert made.meta_step.observer is not None
            errors[name, alpha] = sum(row["error"] for row in made.meta_step.observer.take() if row["k"] == 11)
    assert errors["shift", 0.0002] / errors["shift", 0.0004] == pytest.approx(0.5, abs=0.03)
    assert errors["tangent", 0.0002] / errors["tangent", 0.0004] == pytest.approx(0.25, abs=0.03)
    assert errors["tangent", 0.0002] < 0.1 * errors["shift", 0.0002]


@pytest.mark.parametrize("kind", shifts.SHIFTS.values())
def test_the_estimates_survive_a_checkpoint(kind: Any, tmp_path: Path) -> None:
    def make() -> MetaTrainer:
        return toys.trainer(toys.tasks(2), horizon=15, rounds=1, carry=kind())

    whole, first, second = make(), make(), make()
    toys.run(whole, 15)
    toys.run(first, 12)
    checkpoint.load(checkpoint.save(tmp_path, first.meta_step), second.meta_step)
    toys.run(second, 15)
    assert torch.equal(whole.theta, second.theta)
    assert not torch.equal(whole.theta, toys_with_identity())


def toys_with_identity() -> torch.Tensor:
    made = toys.trainer(toys.tasks(2), horizon=15, rounds=1)
    toys.run(made, 15)
    return made.theta


def test_velocity_shift_needs_a_momentum_buffer() -> None:
    def adam(parameters: Any, lr: float, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr)

    inner = Inner(lr=0.01, optimizer=adam, options={"momentum": 0.9})
    made = toys.trainer(toys.tasks(1), horizon=20, rounds=1, carry=shifts.VelocityShift(), inner=inner)
    with pytest.raises(UsageError, match=r"VelocityShift needs SGD; set inner\.optimizer=sgd"):
        toys.run(made, 20)


def test_the_hessians_norm_is_nearly_its_largest_eigenvalue() -> None:
    a, _ = quadratics.curvatures(2)
    made = on_quadratics("shift", steps=1)
    for row in range(2):
        largest = np.linalg.eigvalsh(a[row]).max()
        assert 0.9 * largest < _norm_of_hessian(made, row) <= largest * (1 + 1e-12)


# -- statistics ------------------------------------------------------------------------------------------------


def made_up(plan: MeasurementPlan, names: list[str], law: Any) -> dict[str, dict[str, Any]]:
    """Units whose errors follow `law(setting, draw, k)`, for two tasks a tenth above and below."""
    return {
        key_of(setting, draw): {
            "curvature": 2.0,
            "parameters": 3,
            "commit": "none",
            "readings": [
                {"k": k, "task": task, "error": factor * law(setting, draw, k), "distance": 2.0}
                for k in plan.ks
                for task, factor in (("a", 0.9), ("b", 1.1))
            ],
        }
        for setting in plan.settings(names)
        for draw in range(plan.draws)
    }


def test_slopes_of_a_power_law_are_its_exponents() -> None:
    plan = MeasurementPlan(draws=3)

    def law(setting: Setting, draw: int, k: int) -> float:
        return (1 + draw) * setting.alpha**1.7 * setting.beta**0.9 * k**2.6

    units = made_up(plan, ["net"], law)
    found = slopes(units, plan, ["net"])
    assert len(found) == 4 * 4
    for slope in found:
        assert slope.measured is not None
        assert slope.measured.mean == pytest.approx({"k": 2.6, "alpha": 1.7, "beta": 0.9}[slope.variable.split(",")[0]])
        assert slope.measured.half_width == pytest.approx(0.0, abs=1e-9)
    predicted = {(s.shifts, s.variable): s.predicted for s in found if s.optimizer == "SGD"}
    assert [predicted["prescribed", v] for v in ("k", "alpha", "beta")] == [2, 1, 1]
    assert [predicted["displacement", v] for v in ("k", "alpha", "beta")] == [3, 2, 1]
    assert all(s.predicted is None for s in found if s.optimizer != "SGD" or s.variable == "k, middle alpha")
    # with h = 2 and alpha = 0.0003, alpha h k <= 0.1 ends at k = 166; at k = 20 it ends at alpha = 0.0025
    assert next(s for s in found if s.variable == "k").points == (10, 20, 50, 100)
    assert next(s for s in found if s.variable == "alpha").points == (0.0003, 0.001)


def test_no_slope_is_claimed_from_a_single_point_in_the_regime() -> None:
    plan = MeasurementPlan(draws=3)
    units = made_up(plan, ["net"], lambda setting, draw, k: k**2.0)
    for unit in units.values():
        unit["curvature"] = 30.0
    found = {s.variable: s.measured for s in slopes(units, plan, ["net"]) if s.shifts == "prescribed"}
    assert found["k"] is None
    assert found["alpha"] is None
    assert found["k, middle alpha"] is not None


def test_an_overflow_is_left_out_and_not_hidden() -> None:
    plan = replace(TINY, draws=3)
    units = made_up(plan, ["net"], lambda setting, draw, k: k**2.0)
    one = next(s for s in plan.settings(["net"]) if s.optimizer == "SGD")
    units[key_of(one, 1)]["readings"][-1] |= {"error": None, "distance": None}
    found = measured(units, one, plan)
    np.testing.assert_allclose(found.error[[0, 2]], [[4, 100, 144]] * 2)
    assert np.isnan(found.error[1, -1])
    assert np.isfinite(found.error[1, :-1]).all()
    np.testing.assert_allclose(found.relative[0], found.error[0] / 2)


def test_shifts_are_compared_draw_by_draw() -> None:
    plan = MeasurementPlan(draws=5, ks=(2, 10, 20), carries=("shift", "hold", "scalar"))
    factors = {"shift": 1.0, "hold": 3.0, "scalar": 0.8}

    def law(setting: Setting, draw: int, k: int) -> float:
        return factors[setting.carry] * k * 10.0**draw * (1 + 0.01 * (draw % 2) * (setting.carry != "shift"))

    found = comparisons(made_up(plan, ["net"], law), plan, ["net"])
    assert [(one.carry, one.k) for one in found] == [("hold", 20), ("scalar", 20)]
    assert CORRECTED == shifts.EVERY
    for one in found:
        assert one.ratio is not None
        assert math.exp(one.ratio.mean) == pytest.approx(factors[one.carry], rel=0.01)
        assert one.p is not None
        assert one.p < 1e-6


def test_whether_kinks_add_error_follows_from_the_intervals() -> None:
    """A factor of 3 under SGD, of 1/3 under momentum, and one that draws disagree on under Adam."""
    plan = MeasurementPlan(draws=4)
    logs = {"SGD": 1.0, "SGD with momentum": -1.0, "Adam": 0.0}

    def law(setting: Setting, draw: int, k: int) -> float:
        return math.exp((logs[setting.optimizer] + 0.1 * (-1) ** draw) * (setting.network == "kinked"))

    units = made_up(plan, ["kinked", "smooth"], law)
    table = [measured(units, setting, plan) for setting in plan.settings(["kinked", "smooth"])]
    said = _kinks(table, ["kinked", "smooth"], plan)
    assert "as the paper says, under SGD 2.72" in said
    assert "kinks lower the error, against the paper, under SGD with momentum 0.37" in said
    assert "undecided under Adam 1.00" in said
    single = [replace(one, error=one.error[:1]) for one in table]
    assert "add error" not in _kinks(single, ["kinked", "smooth"], plan)


def test_the_caption_of_slopes_says_which_k_were_fitted() -> None:
    plan = MeasurementPlan(draws=2)
    found = slopes(made_up(plan, ["net"], lambda setting, draw, k: k**2.0), plan, ["net"])
    middle = next(s for s in found if s.variable == "k, middle alpha")
    assert middle.points == tuple(k for k in plan.ks if k >= 10)
    assert "at the middle alpha over all k from 10 on" in _slope_table(found).caption


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("approximation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "cores", lambda: 1)
        run_experiment(out, plan=TINY)
    return out


def test_figures_page_and_findings_are_written(finished: Path) -> None:
    for name in ("error", "relative", "orders", "shifts"):
        assert (finished / f"{name}.svg").read_text().count("<svg") == 1
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "index.html").read_text()
    assert page.count("<figure>") == 4
    assert not re.search(r'(?:src|href)="(?!#)', page)
    results = json.loads((finished / "results.json").read_text())
    assert results["plan"] == json.loads(json.dumps(asdict(TINY)))
    assert max(results["quadratics"].values()) < 1e-10
    findings = (finished / "findings.md").read_text()
    assert findings.count("along the same shifts of phi (momentum, beta 0.03)") == 2
    assert "Algorithm 2 with beta 0.03 (SGD with momentum, alpha 0.01)" in findings
    slope = next(s for s in results["slopes"] if s["variable"] == "beta" and s["shifts"] == "prescribed")
    assert f"beta^{slope['measured']['mean']:.2f}" in findings
    assert "0 of 56 trajectories overflowed." in findings
    assert f"relative {max(results['quadratics'].values()):.1e}" in findings


def test_it_goes_on_where_it_was_cut_and_says_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished / UNITS).read_text().splitlines()
    damaged = [whole[0][:-9], "[1, 2]", '{"draw": 1}']
    (tmp_path / SETTINGS).write_text((finished / SETTINGS).read_text())
    (tmp_path / UNITS).write_text("\n".join([*damaged, *whole[3:-3]]) + "\n" + whole[-3][:40])
    run_experiment(tmp_path, plan=TINY)
    assert sorted((tmp_path / UNITS).read_text().splitlines()) == sorted(damaged + whole)
    assert f"note: {tmp_path / UNITS} is damaged in line 1, 2, 3; measured again" in capsys.readouterr().out
    for name in ("findings.md", "error.svg", "shifts.svg", "index.html"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_the_error_at_k_1_is_zero() -> None:
    plan = replace(TINY, ks=(1, 2))
    laboratory = Laboratory(chosen_recipe(None, []), plan)
    setting = next(s for s in plan.settings(list(laboratory.networks)) if s.shifts == "prescribed")
    errors = {r["k"]: r["error"] for r in laboratory.measure(setting, 0)["readings"] if r["task"] == "mirrored"}
    assert errors[1] == 0.0 < errors[2]


def test_errors_grow_with_k(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / UNITS).read_text().splitlines()]
    for row in rows:
        errors = {r["k"]: r["error"] for r in row["readings"] if r["task"] == "mirrored"}
        assert 0.0 < errors[2] < errors[10] < errors[12]


def test_a_folder_of_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="contains an experiment with other settings; name another folder with --out"):
        run_experiment(finished, plan=replace(TINY, draws=3))


def test_settings_hold_what_was_used(finished: Path) -> None:
    recipe = json.loads((finished / SETTINGS).read_text())["recipe"]
    assert list(recipe) == ["tasks", "train_on", "data", "model", "head", "shared", "batch_size"]
    assert list(recipe["tasks"]) == ["mirrored", "few-classes"]


def test_settings_that_cannot_be_read_are_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / UNITS).write_text((finished / UNITS).read_text())
    for text in (None, (finished / SETTINGS).read_text()[:40]):
        if text is not None:
            (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(UsageError, match=r"settings\.json cannot be read .*; put it back, or name another folder"):
            run_experiment(tmp_path, plan=TINY)


def test_settings_of_a_command_that_measured_nothing_do_not_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise UsageError("at the model")

    monkeypatch.setattr(experiment, "_measure", refuse)
    for width in (-1, 8):
        with pytest.raises(UsageError, match="at the model"):
            run_experiment(tmp_path, overrides=[f"model.options.width={width}"], plan=TINY)
    assert json.loads((tmp_path / SETTINGS).read_text())["recipe"]["model"]["options"]["width"] == 8


@pytest.mark.usefixtures("undrawn")
def test_where_nothing_can_be_written_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write to /proc/x: .*; choose another --out"):
        run_experiment(Path("/proc/x"), plan=TINY)
    for name in (SETTINGS, UNITS):
        (tmp_path / name).write_text((finished / name).read_text())
    (tmp_path / "findings.md").mkdir()
    with pytest.raises(UsageError, match=r"Is a directory.*; choose another --out"):
        run_experiment(tmp_path, plan=TINY)


def test_other_models_are_measured_as_they_are() -> None:
    assert list(networks(chosen_recipe(None, ["model.name=resnet20", "model.options={}"]))) == ["resnet20"]
    with pytest.raises(UsageError, match=r"model\.options\.pool is set, but both networks are measured; drop it"):
        networks(chosen_recipe("digits", ["model.options.pool=avg"]))


UNUSED = "this experiment does not use it, only tasks, train_on, data, model, head, shared, batch_size; drop it"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["digit"], "no recipe 'digit': neither a file nor built in; did you mean 'digits'?"),
        (["digits", "small-images"], "two recipes are named, 'digits' and 'small-images'; name one"),
        (["device=cuda"], f"device is set, but {UNUSED}"),
        (["digits", "batch_size=8", "inner.lr=77", "horizon=3"], f"inner.lr is set, but {UNUSED}"),
        (
            ["tasks.parity.flip=true"],
            "tasks.parity.flip is set, but train_on leaves 'parity' out; add it, or drop the field",
        ),
        (["model.option.width=3"], "digits.yaml: unknown field 'option' in model; did you mean 'options'?"),
    ],
)
def test_the_command_names_what_is_wrong(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["trajshift", "experiment", "approximation-error", *words, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"trajshift: {sentence}\n"
    assert not (tmp_path / "out").exists()
