"""Inner optimizers inside the loop: torch.optim by name, flat rows, schedules, clipping, autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.learners import ConvNet, everything, image_tasks, make, run
from tests.helpers.quadratics import DIMENSION, curvatures, gradient, phi_of, start, tasks, theta_of, trainer
from trajshift import Inner, Task, UsageError
from trajshift.learners.inner_optimizer import build_optimizer

A, C = curvatures(3)
REFUSED = {"LBFGS", "SparseAdam", "Optimizer"}
CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in REFUSED
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "ASGD": {"t0": 1.0, "lambd": 0.01},
    "Muon": {"adjust_lr_fn": "original"},
}


class Plain:
    """Trajectory shifting of quadratic tasks with one `torch.optim` optimizer for each task."""

    def __init__(self, build: Callable[..., torch.optim.Optimizer], beta: float) -> None:
        self.phi = torch.tensor(start())
        self.beta = beta
        self.thetas = [nn.Parameter(self.phi.clone()) for _ in A]
        self.optimizers = [build([theta]) for theta in self.thetas]

    def round(self, horizon: int, rate: Callable[[int], float] | None = None) -> None:
        for theta in self.thetas:
            theta.data.copy_(self.phi)
        for k in range(1, horizon + 1):
            for t, (theta, optimizer) in enumerate(zip(self.thetas, self.optimizers, strict=True)):
                theta.grad = torch.from_numpy(A[t] @ (theta.detach().numpy() - C[t]))
                if rate is not None:
                    optimizer.param_groups[0]["lr"] = rate(k - 1)
                optimizer.step()
            delta = -self.beta * (self.phi - torch.stack([theta.data for theta in self.thetas]).mean(0))
            self.phi = self.phi + delta
            for theta, optimizer in zip(self.thetas, self.optimizers, strict=True):
                if k < horizon:
                    theta.data.add_(delta)
                    for name in {"ax"} & optimizer.state[theta].keys():
                        optimizer.state[theta][name].add_(delta)


# -- torch.optim by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"Muon"}))
def test_every_class_of_torch_optim_runs_and_keeps_its_state(name: str) -> None:
    options = OPTIONS.get(name, {})
    plain = Plain(lambda parameters: CLASSES[name](parameters, lr=0.02, **options), beta=0.3)
    inner = Inner(optimizer=name.lower(), lr=0.02, options=options)
    made = trainer(tasks(A, C), "trajectory-shifting", inner=inner, meta_lr=0.3, horizon=4, rounds=3)
    for _ in range(3):
        plain.round(4)
        run(made, 4)
        np.testing.assert_allclose(phi_of(made), plain.phi.numpy(), rtol=1e-10, atol=1e-12)
    for row, theta in zip(theta_of(made), plain.thetas, strict=True):
        np.testing.assert_allclose(row, theta.detach().numpy(), rtol=1e-10, atol=1e-12)
    if name == "ASGD":
        for learner, theta, optimizer in zip(made.learners, plain.thetas, plain.optimizers, strict=True):
            average = learner.optimizer.state[learner.shared["theta"]]["ax"]
            torch.testing.assert_close(average, optimizer.state[theta]["ax"], rtol=1e-11, atol=1e-12)
            assert not torch.allclose(average, theta.data)


def test_asgds_average_moves_with_the_shift_and_momentum_does_not() -> None:
    made = trainer(tasks(A, C), "trajectory-shifting", inner=Inner(optimizer="asgd"), meta_lr=0.3, horizon=4, rounds=1)
    run(made, 1)
    state = made.learners[0].optimizer.state[made.learners[0].shared["theta"]]
    np.testing.assert_allclose(state["ax"].numpy(), theta_of(made)[0], rtol=1e-13)  # after one step ax = theta
    inner = Inner(options={"momentum": 0.9})
    made = trainer(tasks(A, C), "trajectory-shifting", inner=inner, meta_lr=0.3, horizon=4, rounds=1)
    run(made, 1)
    buffer = made.learners[0].optimizer.state[made.learners[0].shared["theta"]]["momentum_buffer"]
    np.testing.assert_allclose(buffer.numpy(), A[0] @ (start() - C[0]), rtol=1e-13)


def test_muon_runs_on_matrices_and_says_what_it_needs_elsewhere() -> None:
    if "Muon" not in CLASSES:
        pytest.skip("this torch has no Muon")

    class Matrices(nn.Module):
        def __init__(self, task: Task) -> None:
            super().__init__()
            self.body = nn.Linear(36, 4, bias=False, dtype=torch.float64)
            self.fc = nn.Linear(4, task.outputs, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.fc(torch.tanh(self.body(x.flatten(1))))

    made = run(make("trajectory-shifting", image_tasks((2, 3)), Matrices, inner=Inner(optimizer="muon")))
    assert made.phi.isfinite().all()
    with pytest.raises(UsageError, match="2D"):
        run(make("trajectory-shifting", image_tasks((2, 3)), inner=Inner(optimizer="muon")))


@pytest.mark.parametrize(("name", "reason"), [("LBFGS", "closure"), ("SparseAdam", "sparse")])
def test_refused_with_the_reason_however_it_is_given(name: str, reason: str) -> None:
    kind = getattr(torch.optim, name)
    for given in (name, name.lower(), kind):
        with pytest.raises(UsageError, match=reason):
            make("reptile", image_tasks(), inner=Inner(optimizer=given))
    with pytest.raises(UsageError, match=reason):
        run(make("reptile", image_tasks(), inner=Inner(optimizer=lambda parameters, lr: kind(parameters, lr=lr))), 1)


def test_unknown_names_and_options_are_told_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        make("reptile", image_tasks(), inner=Inner(optimizer="adamww"))
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        Inner(schedule="cosin")
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="positive"):
            Inner(lr=lr)
    with pytest.raises(UsageError, match=r"optimizer sgd does not accept .*moment"):
        run(make("reptile", image_tasks(), inner=Inner(options={"moment": 0.9})), 1)
    with pytest.raises(UsageError, match="does not accept"):
        run(make("reptile", image_tasks(), inner=Inner(options={"momentum": -1.0})), 1)
    with pytest.raises(UsageError, match="elementwise"):
        Inner(optimizer="adafactor", flat=True)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_momentum_where_a_parameter_gets_its_first_gradient_late(options: dict[str, Any]) -> None:
    """As heads brought up first, layers dropped at random or experts chosen by a router have it."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
    ours, torchs = ([nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)] for _ in range(2))
    steps = (build_optimizer("sgd", ours, **options), torch.optim.SGD(torchs, foreach=False, **options))
    for step in range(5):
        for parameters, optimizer in zip((ours, torchs), steps, strict=True):
            optimizer.zero_grad()
            used = parameters if step >= 2 else parameters[:1]
            torch.stack([(parameter**2).sum() for parameter in used]).sum().backward()
            optimizer.step()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0.0)


def test_a_callable_is_an_optimizer_too() -> None:
    def mine(parameters: list[nn.Parameter], lr: float, strength: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=strength, fused=True)

    ends = [
        everything(run(make("trajectory-shifting", image_tasks(), inner=inner)))
        for inner in (
            Inner(lr=0.05, options={"momentum": 0.9}),
            Inner(optimizer=mine, lr=0.05, options={"strength": 0.9}),
            Inner(optimizer=torch.optim.SGD, lr=0.05, options={"momentum": 0.9}),
        )
    ]
    for name, tensor in ends[0].items():
        assert torch.equal(ends[1][name], tensor)
        assert torch.equal(ends[2][name], tensor)


# -- flat ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("adam", {"weight_decay": 0.01, "amsgrad": True}),
        ("adamw", {}),
        ("rmsprop", {"momentum": 0.9, "centered": True}),
    ],
)
def test_flat_equals_per_parameter(name: str, options: dict[str, Any]) -> None:
    ends = []
    for flat in (False, True):
        inner = Inner(optimizer=name, lr=0.02, options=options, flat=flat)
        made = run(make("trajectory-shifting", image_tasks(), inner=inner, rounds=3))
        ends.append({**made.initialization, **{n: t for n, t in everything(made).items() if "optimizer" not in n}})
        assert len(made.learners[0].optimizer.param_groups[0]["params"]) == (3 if flat else 6)
    for label, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][label], tensor, rtol=1e-12, atol=1e-13)


def test_flat_refuses_a_parameter_without_gradient() -> None:
    class Partial(ConvNet):
        def __init__(self, task: Task) -> None:
            super().__init__(task)
            self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    with pytest.raises(UsageError, match="'unused' got no gradient in task 'images0'"):
        run(make("reptile", image_tasks(), Partial, inner=Inner(options={}, flat=True)), 1)


# -- schedules, clipping, autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("step", [1, 1, 1, 1, 0.3, 0.3, 0.3, 0.09, 0.09, 0.027]),
        ("cosine", [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]),
        (lambda fraction: 1 - fraction, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
    ids=["constant", "step", "cosine", "callable"],
)
def test_schedules_run_inside_the_horizon_and_start_again_with_it(schedule: Any, factors: list[float]) -> None:
    options = {"momentum": 0.9}
    plain = Plain(lambda parameters: torch.optim.SGD(parameters, lr=1.0, **options), beta=0.3)
    inner = Inner(lr=0.1, options=options, schedule=schedule)
    made = trainer(tasks(A, C), "trajectory-shifting", inner=inner, meta_lr=0.3, horizon=10, rounds=2)
    for _ in range(2):
        plain.round(10, rate=lambda k: 0.1 * factors[k])
        run(made, 10)
        np.testing.assert_allclose(phi_of(made), plain.phi.numpy(), rtol=1e-11, atol=1e-12)


def test_milestones_and_factor() -> None:
    inner = Inner(lr=2.0, schedule="step", milestones=(0.5, 0.75), factor=0.1)
    assert [inner.lr_at(k / 4) for k in range(4)] == pytest.approx([2.0, 2.0, 0.2, 0.02])


def test_gradient_clipping_is_per_task() -> None:
    norms = np.linalg.norm(gradient(A, C, start()), axis=1)
    limit = float(np.median(norms))  # one task is clipped, one at the limit, one is not
    made = run(trainer(tasks(A, C), "reptile", lr=0.1, horizon=5, grad_clip=limit), 1)
    expected = start() - 0.1 * gradient(A, C, start()) * np.minimum(1, limit / (norms + 1e-6))[:, None]
    np.testing.assert_allclose(theta_of(made), expected, rtol=1e-12)
    assert (norms < limit).any()
    assert (norms > limit).any()


def test_the_clipped_norm_is_that_of_body_and_head_together() -> None:
    moves = []
    for limit in (None, 0.01):
        made = make("reptile", image_tasks(), grad_clip=limit, inner=Inner(lr=1.0, options={}))
        run(made, 1)
        head = torch.zeros(0, dtype=torch.float64)
        fresh = make("reptile", image_tasks(), inner=Inner(lr=1e-30, options={}))
        run(fresh, 1)
        row, other = made.learners[0], fresh.learners[0]
        head = torch.cat([(row.own[name] - other.own[name]).flatten() for name in row.own])
        moves.append(torch.cat([(made.theta[0] - made.phi), head]).detach())
    assert torch.linalg.vector_norm(moves[1]) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moves[1] / moves[1].norm(), moves[0] / moves[0].norm(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["trajectory-shifting", "leap", "imaml", "mtl"])
def test_autocast_runs_the_forward_pass_in_bfloat16_and_keeps_parameters(method: str) -> None:
    seen: set[torch.dtype] = set()

    def single(task: Task) -> nn.Module:
        module = ConvNet(task, dtype=torch.float32)
        module.fc.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
        return module

    exact = run(make(method, image_tasks(), single))
    assert seen == {torch.float32}
    seen.clear()
    made = run(make(method, image_tasks(), single, autocast=torch.bfloat16))
    assert seen == {torch.bfloat16}
    state = everything(made)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(made.phi, exact.phi, rtol=0.05, atol=0.02)
    assert not torch.equal(made.phi, exact.phi)
    assert made.phi.numel() > DIMENSION
