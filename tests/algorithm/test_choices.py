"""The four choices: identities between presets, free mixes, refusals, meta-optimizers and budgets."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.quadratics import (
    DIMENSION,
    curvatures,
    gradient,
    leap,
    phi_of,
    start,
    tasks,
    theta_of,
    trainer,
    value,
)
from trajshift import METHODS, Inner, MetaTrainer, Task, UsageError
from trajshift.algorithm.meta_gradients import Displacement, LastGradient, MetaGradient, PathLength

ALPHA, BETA = 0.1, 0.3
A, C = curvatures(3)
Array = np.ndarray


def run(method: str, steps: int | None = None, **options: object) -> MetaTrainer:
    made = trainer(tasks(A, C), method, lr=ALPHA, **{"horizon": 6, "rounds": 3, "meta_lr": BETA, **options})
    for _ in range(made.total_steps if steps is None else steps):
        made.advance()
    return made


def bits_of(made: MetaTrainer) -> tuple[bytes, bytes]:
    return made.phi.numpy().tobytes(), made.theta.numpy().tobytes()


# -- identities ------------------------------------------------------------------------------------------------

MOMENTUM = Inner(lr=ALPHA, options={"momentum": 0.9, "weight_decay": 5e-4})


@pytest.mark.parametrize("carry", ["trajectory-shifting", "no-shifting", "random-shifting", "accurate"])
def test_meta_every_k_is_reptile_bit_for_bit(carry: str) -> None:
    assert bits_of(run(carry, meta_every=6, inner=MOMENTUM)) == bits_of(run("reptile", inner=MOMENTUM))


@pytest.mark.parametrize("other", ["reptile", "accurate", "no-shifting", "random-shifting"])
def test_with_horizon_one_all_displacement_methods_are_one(other: str) -> None:
    reference = run("trajectory-shifting", horizon=1, rounds=8, inner=MOMENTUM)
    assert bits_of(run(other, horizon=1, rounds=8, inner=MOMENTUM)) == bits_of(reference)


def test_with_horizon_one_fomaml_is_reptile_with_meta_lr_alpha_beta() -> None:
    fomaml = run("fomaml", horizon=1, rounds=8, meta_lr=ALPHA * BETA)
    np.testing.assert_allclose(phi_of(fomaml), phi_of(run("reptile", horizon=1, rounds=8)), rtol=1e-13, atol=1e-14)


# -- what the carries do ---------------------------------------------------------------------------------------


def test_no_shifting_leaves_the_trajectories_to_their_task() -> None:
    made = run("no-shifting", steps=5)
    for t in range(3):
        eye = np.eye(DIMENSION)
        alone = C[t] + np.linalg.matrix_power(eye - ALPHA * A[t], 5) @ (start() - C[t])
        np.testing.assert_allclose(theta_of(made)[t], alone, rtol=1e-13, atol=1e-14)


def test_random_shifting_moves_each_task_its_own_way_by_the_norm_of_delta() -> None:
    made, seen = run("random-shifting", steps=0), []
    for _ in range(4):
        before = phi_of(made)
        theta = theta_of(made) if made.k else np.tile(before, (3, 1))
        stepped = theta - ALPHA * gradient(A, C, theta)
        made.advance()
        delta, moved = phi_of(made) - before, theta_of(made) - stepped
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(delta), rtol=1e-10)
        seen += [row / np.linalg.norm(row) for row in moved] + [delta / np.linalg.norm(delta)]
    cosines = np.abs(np.stack(seen) @ np.stack(seen).T - np.eye(len(seen)))
    assert cosines.max() < 0.999  # neither two tasks, nor two steps, nor delta itself share a direction
    assert not made.theta[:, DIMENSION:].any()
    assert not made.phi[DIMENSION:].any()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].adapt == "all"])
def test_padding_stays_zero(method: str) -> None:
    made = run(method, inner=MOMENTUM)
    assert made.phi.numel() > DIMENSION
    assert not made.theta[:, DIMENSION:].any()
    assert not made.phi[DIMENSION:].any()


# -- free mixes, against one plain simulation ------------------------------------------------------------------


def simulate(metagrad: str, carry: str, every: int, horizon: int, rounds: int, beta: float) -> tuple[Array, Array]:
    """phi and theta by the plain loop, all tasks at once in numpy; gradient descent inside."""
    phi = start()

    def inner(theta: Array, path: list[tuple[Array, Array]]) -> Array:
        path.append((theta, theta - ALPHA * gradient(A, C, theta)))
        return path[-1][1]

    def read(theta: Array, path: list[tuple[Array, Array]]) -> Array:
        if metagrad == "displacement":
            return phi - theta
        if metagrad == "path_length":
            return leap(A, C, path, power=1, loss=True, stabilizer=True)
        return gradient(A, C, path[-1][0] if metagrad == "last_gradient" else theta)

    for _ in range(rounds):
        theta, path = np.tile(phi, (3, 1)), []
        for k in range(1, horizon + 1):
            theta = inner(theta, path)
            if k % every:
                continue
            delta = -beta * read(theta, path).mean(axis=0)
            phi = phi + delta
            if carry == "shift" and k < horizon:
                theta = theta + delta
            if carry == "replay" and k < horizon:
                theta, path = np.tile(phi, (3, 1)), []
                for _ in range(k):
                    theta = inner(theta, path)
    return phi, theta


@pytest.mark.parametrize(("every", "horizon"), [(1, 6), (10, 20), (6, 6)])
@pytest.mark.parametrize("carry", ["shift", "hold", "replay"])
@pytest.mark.parametrize("metagrad", ["displacement", "last_gradient", "heldout gradient", "path_length"])
def test_free_mixes(metagrad: str, carry: str, every: int, horizon: int) -> None:
    name, batch = ("last_gradient", "heldout") if metagrad.startswith("heldout") else (metagrad, "train")
    made = run(
        "trajectory-shifting", metagrad=name, batch=batch, carry=carry, meta_every=every, horizon=horizon, rounds=2,
        meta_lr=0.02,
    )  # fmt: skip
    phi, theta = simulate(metagrad, carry, every, horizon, 2, 0.02)
    np.testing.assert_allclose(phi_of(made), phi, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(theta_of(made), theta, rtol=1e-9, atol=1e-10)


def test_an_instance_equals_the_name_with_options() -> None:
    named = run("leap", metagrad_options={"norm": False}, meta_lr=0.01)
    assert bits_of(run("leap", metagrad=PathLength(norm=False), meta_lr=0.01)) == bits_of(named)


def test_a_metagradient_of_ones_own() -> None:
    class Half(MetaGradient):
        def read(self, probe):
            return (probe.phi - probe.theta) / 2

    halved = run("trajectory-shifting", metagrad=Half())
    np.testing.assert_allclose(phi_of(halved), phi_of(run("trajectory-shifting", meta_lr=BETA / 2)), rtol=1e-12)


def test_a_method_of_ones_own() -> None:
    mine = replace(METHODS["leap"], name="shifted leap", meta_every=2, carry="shift")
    same = run("leap", meta_every=2, carry="shift")
    assert bits_of(run(mine)) == bits_of(same)


# -- refusals --------------------------------------------------------------------------------------------------


def without_addresses(value: object) -> str:
    """A test's name that is the same in every process."""
    return re.sub(r"<\S+\.(\w+) object at \w+>", r"\1()", str(value))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("reptil", {}, "did you mean 'reptile'"),
        ("reptile", {"horizon": 0}, "horizon is 0"),
        ("reptile", {"horizon": -3}, "horizon is -3"),
        ("reptile", {"rounds": 0}, "rounds is 0"),
        ("trajectory-shifting", {"meta_every": 4}, "does not divide the horizon 6"),
        ("trajectory-shifting", {"meta_every": 12}, "from 1 to the horizon, 6"),
        ("trajectory-shifting", {"meta_every": 0}, "from 1 to the horizon, 6"),
        ("trajectory-shifting", {"adapt": "head"}, "never leave phi"),
        ("leap", {"adapt": "head"}, "never leave phi"),
        ("anil", {"meta_every": 2, "carry": "random"}, "only noise"),
        ("reptile", {"batch": "heldout"}, "takes no gradient of its own"),
        ("mtl", {"carry": "hold", "meta_lr": None}, "joint training"),
        ("mtl", {"meta_every": 2, "meta_lr": None}, "joint training"),
        ("mtl", {"metagrad": "displacement", "meta_lr": None}, "never leave phi"),
        ("mtl", {"metagrad": Displacement(), "meta_lr": None}, "never leave phi"),
        ("mtl", {"metagrad": MetaGradient(), "meta_lr": None}, "joint training"),
        ("mtl", {}, "moves phi with the inner optimizer"),
        ("mtl", {"meta_lr": None, "meta_optimizer": "adam"}, "moves phi with the inner optimizer"),
        ("anil", {"metagrad": Displacement()}, "never leave phi"),
        ("single-task", {"meta_lr": None}, "trains on one task, 3 were given"),
        ("reptile", {"carry": "shfit"}, "did you mean 'shift'"),
        ("reptile", {"metagrad": "displacment"}, "did you mean 'displacement'"),
        ("reptile", {"metagrad_options": {"norm": True}}, "does not accept"),
        ("leap", {"metagrad": PathLength(), "metagrad_options": {"norm": False}}, "already has"),
        ("fomaml", {"metagrad": LastGradient(), "batch": "heldout"}, "already has"),
        ("imaml", {"metagrad_options": {"strength": 0.0}}, "positive"),
        ("reptile", {"meta_lr": 0.0}, r"meta\.lr is 0\.0"),
        ("reptile", {"meta_lr": float("nan")}, r"meta\.lr is nan"),
        ("reptile", {"meta_options": {"betas": (0.9, 0.99)}}, "name one, or drop them"),
        ("reptile", {"meta_optimizer": "adamm"}, "did you mean 'adam'"),
        ("reptile", {"grad_clip": 0.0}, "grad_clip is 0.0"),
        ("reptile", {"renew": ("head",)}, "did you mean 'heads'"),
        ("reptile", {"tasks_per_round": 4}, "from 1 to 3, the number of tasks"),
        ("fomaml", {"batch": "heldout", "heldout": 1.0}, "heldout is 1.0"),
    ],
    ids=without_addresses,
)
def test_refused_with_the_reason(method: str, options: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run(method, **options)


def test_task_lists_that_make_no_run() -> None:
    with pytest.raises(UsageError, match="no tasks"):
        trainer([], "reptile")
    with pytest.raises(UsageError, match="two tasks are named 'q0'"):
        trainer(tasks(A, C)[:1] * 2, "reptile")


def test_a_preset_that_held_batches_out_takes_another_metagradient() -> None:
    made = run("imaml", metagrad="displacement")
    assert bits_of(made) == bits_of(run("reptile"))


def test_batch_of_an_instance_is_told() -> None:
    assert run("fomaml", steps=0, metagrad=LastGradient(batch="heldout")).describe()["batch"] == "heldout"


# -- the meta-optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.9)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (torch.optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
    ids=["adam", "sgd", "adamw class"],
)
def test_meta_optimizer_is_fed_the_metagradient_and_shifts_by_what_phi_moved(name, kind, options) -> None:
    made = trainer(
        tasks(A, C), "trajectory-shifting", lr=ALPHA, horizon=4, rounds=3, meta_lr=0.05, meta_optimizer=name,
        meta_options=options,
    )  # fmt: skip
    phi = nn.Parameter(torch.tensor(start()))
    optimizer = kind([phi], lr=0.05, **options)
    for event in made:
        if event.k == 1:
            theta = np.tile(phi.detach().numpy(), (3, 1))
        theta = theta - ALPHA * gradient(A, C, theta)
        before = phi.detach().numpy().copy()
        phi.grad = torch.from_numpy(before - theta.mean(axis=0))
        optimizer.step()
        if event.k < 4:
            theta = theta + (phi.detach().numpy() - before)
        np.testing.assert_allclose(phi_of(made), phi.detach().numpy(), rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(theta_of(made), theta, rtol=1e-10, atol=1e-11)
    assert not made.phi[DIMENSION:].any()


# -- joint training --------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A shared body and a head of the task's size."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Linear(4, 6, dtype=torch.float64)
        self.head = nn.Linear(6, task.outputs, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def regressions(count: int) -> list[Task]:
    """Tasks whose every batch is the whole training set (in an order that does not matter)."""
    torch.manual_seed(1)
    listed = []
    for t in range(count):
        x = torch.randn(8, 4, dtype=torch.float64)
        data = (x, torch.randn(8, t + 1, dtype=torch.float64))
        listed.append(Task(name=f"r{t}", train=data, outputs=t + 1, kind="regression", weight=1.0 + t))
    return listed


@pytest.mark.parametrize(("method", "count"), [("mtl", 3), ("single-task", 1)])
def test_joint_training_is_the_plain_loop(method: str, count: int) -> None:
    listed = regressions(count)
    options = {"momentum": 0.9, "weight_decay": 0.01}
    inner = Inner(lr=0.05, options=options, schedule="cosine")
    made = MetaTrainer(Net, listed, method, horizon=5, rounds=4, inner=inner, batch_size=8)
    nets = [Net(task) for task in listed]
    body = nets[0].body
    for net in nets:
        net.body = body
    parameters = [*body.parameters(), *(p for net in nets for p in net.head.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.05, **options)
    total = sum(task.weight for task in listed)
    for event in made:
        optimizer.zero_grad()
        data = [task.train for task in listed]
        losses = [nn.functional.mse_loss(net(x), y) for net, (x, y) in zip(nets, data, strict=True)]
        joint = sum(task.weight / total * loss for task, loss in zip(listed, losses, strict=True))
        gradients = torch.autograd.grad(joint, list(body.parameters()), retain_graph=True)
        sum(losses).backward()  # each head follows its own task's loss
        for parameter, gradient_of_joint in zip(body.parameters(), gradients, strict=True):
            parameter.grad = gradient_of_joint
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + np.cos(np.pi * (event.k - 1) / 5))
        optimizer.step()
        torch.testing.assert_close(event.losses, torch.stack(losses).detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(made.initialization["body.weight"], body.weight.detach(), rtol=1e-11, atol=1e-12)
        if event.k < 5:  # theta = phi, to the bit; the last shift of a round is left to the reset
            assert all(torch.equal(row, made.phi) for row in made.theta)
        for learner, net in zip(made.learners, nets, strict=True):
            torch.testing.assert_close(learner.module.head.weight, net.head.weight, rtol=1e-11, atol=1e-12)


# -- budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inner_steps", "evaluations"),
    [  # per task, of one round of 6 steps; a mean over the tasks adds nothing
        ("trajectory-shifting", 6, 6),
        ("accurate", 1 + 2 + 3 + 4 + 5 + 6, 21),
        ("no-shifting", 6, 6),
        ("random-shifting", 6, 6),
        ("reptile", 6, 6),
        ("fomaml", 6, 6),
        ("fomaml++", 6, 6),
        ("leap", 6, 6 + 1),
    ],
)
def test_budgets(method: str, inner_steps: int, evaluations: int) -> None:
    metrics = run(method, rounds=2).metrics()
    assert metrics["inner_steps"] == 2 * inner_steps
    assert metrics["gradient_evaluations"] == 2 * 3 * evaluations


def test_budgets_of_passes_beyond_the_inner_steps() -> None:
    assert run("fomaml", batch="heldout", rounds=2).metrics()["gradient_evaluations"] == 2 * 3 * (6 + 1)
    assert run("fomaml++", batch="heldout", rounds=2).metrics()["gradient_evaluations"] == 2 * 3 * (6 + 6)
    no_loss = run("leap", rounds=2, metagrad_options={"loss": False}).metrics()
    assert no_loss["gradient_evaluations"] == 2 * 3 * 6
    implicit = run("imaml", rounds=2, metagrad_options={"steps": 4, "tolerance": 0.0}).metrics()
    # one gradient, one graph and four products of two evaluations
    assert implicit["gradient_evaluations"] == 2 * 3 * (6 + 1 + 1 + 2 * 4)
    assert implicit["inner_steps"] == 12


@pytest.mark.parametrize(("method", "count"), [("mtl", 3), ("single-task", 1), ("anil", 3)])
def test_budgets_of_methods_that_adapt_the_head(method: str, count: int) -> None:
    made = MetaTrainer(Net, regressions(count), method, horizon=6, rounds=2, batch_size=8)
    for event in made:
        assert event.inner_steps == event.step
    assert made.metrics()["gradient_evaluations"] == 12 * count


def test_accurate_replays_count_in_events_too() -> None:
    made = run("accurate", steps=0)
    assert [event.inner_steps for event in made][:6] == [2, 5, 9, 14, 20, 21]


def test_losses_distances_and_the_update_norm_are_metrics() -> None:
    made = run("reptile", steps=2)
    losses = [value(A, C, theta) for theta in (np.tile(start(), (3, 1)), start() - ALPHA * gradient(A, C, start()))]
    metrics = made.metrics()
    for t, row in enumerate(metrics["tasks"].values()):
        assert row["loss"] == pytest.approx((losses[0][t] + losses[1][t]) / 2)
        assert row["distance"] == pytest.approx(np.linalg.norm(theta_of(made)[t] - start()))
    for _ in range(4):
        made.advance()
    assert made.metrics()["meta_update_norm"] == pytest.approx(np.linalg.norm(phi_of(made) - start()))
    assert (made.metrics()["step"], made.metrics()["round"], made.metrics()["k"]) == (6, 0, 6)
