"""The loop against a plain PyTorch re-implementation: separate models, torch.optim, no flat matrix."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.learners import ConvNet, everything, image_tasks, make
from trajshift import Inner, Task
from trajshift.data.batches import TaskBatches

HORIZON, ROUNDS, SEED, BATCH = 10, 5, 4, 5
OPTIONS = {"momentum": 0.9, "weight_decay": 5e-4}
LR, META_LR = 0.05, 0.2


def factory(task: Task) -> nn.Module:
    """Its body is the same for all tasks, its head depends on the number of classes alone."""
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    module = ConvNet(task)
    torch.random.set_rng_state(state)
    return module


class Twin:
    """Algorithms 1 and 2 as printed, with one deep-copied model and one optimizer for each task."""

    def __init__(self, tasks: list[Task], method: str, *, weights: list[float]) -> None:
        self.method = method
        self.weights = [weight / sum(weights) for weight in weights]
        self.models = [copy.deepcopy(factory(task)).train() for task in tasks]
        self.shared = [name for name, _ in self.models[0].named_parameters() if not name.startswith("fc.")]
        self.phi = {name: self.models[0].get_parameter(name).detach().clone() for name in self.shared}
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=LR, **OPTIONS) for model in self.models]
        self.batches = [TaskBatches(task, seed=SEED, batch_size=BATCH) for task in tasks]

    @torch.no_grad()
    def reset(self) -> None:
        for model in self.models:
            for name in self.shared:
                model.get_parameter(name).copy_(self.phi[name])

    def step(self, step: int) -> None:
        k = step % HORIZON
        if k == 0:
            self.reset()
        for model, optimizer, batches in zip(self.models, self.optimizers, self.batches, strict=True):
            x, y = batches.train(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if self.method == "trajectory-shifting" or k == HORIZON - 1:
            self.meta_update(shift=k < HORIZON - 1)

    @torch.no_grad()
    def meta_update(self, *, shift: bool) -> None:
        for name in self.shared:
            rows = [model.get_parameter(name) for model in self.models]
            directions = [row.grad if self.method == "fomaml" else self.phi[name] - row for row in rows]
            delta = -META_LR * sum(w * d for w, d in zip(self.weights, directions, strict=True))
            self.phi[name] += delta
            if shift:
                for row in rows:
                    row += delta


@pytest.mark.parametrize("flat", [False, True], ids=["per parameter", "flat"])
@pytest.mark.parametrize("method", ["trajectory-shifting", "reptile", "fomaml"])
def test_fifty_steps_agree(method: str, flat: bool) -> None:
    tasks = image_tasks((2, 3, 5))
    tasks[1].weight = 2.0
    twin = Twin(tasks, method, weights=[1.0, 2.0, 1.0])
    inner = Inner(lr=LR, options=OPTIONS, flat=flat)
    sizes = {"horizon": HORIZON, "rounds": ROUNDS, "batch_size": BATCH}
    trainer = make(method, tasks, factory, seed=SEED, meta_lr=META_LR, inner=inner, **sizes)
    before = trainer.initialization
    for event in trainer:
        twin.step(event.step - 1)
        compare(trainer.layout.views(trainer.phi), twin.phi)
        for learner, model in zip(trainer.learners, twin.models, strict=True):
            compare(dict(learner.module.named_parameters()), dict(model.named_parameters()))
            compare(dict(learner.module.named_buffers()), dict(model.named_buffers()))
    assert max((before[name] - twin.phi[name]).abs().max() for name in twin.shared) > 1e-2  # it did train


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_norm_scale_and_bias_are_shared_and_running_statistics_are_not() -> None:
    trainer = make("trajectory-shifting", image_tasks((2, 3, 5)), horizon=3, rounds=2)
    names = {entry.name for entry in trainer.layout.entries}
    assert names == {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"}
    for _ in range(4):  # one step into the second round: phi moved, all rows started from it
        trainer.advance()
    state = everything(trainer)
    means = [state[f"images{t}/buffer/body.1.running_mean"] for t in range(3)]
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert all(state[f"images{t}/buffer/body.1.num_batches_tracked"] == 4 for t in range(3))
    assert not any("running" in name for name in trainer.initialization)
    assert "body.1.weight" in trainer.initialization


@pytest.mark.parametrize("k", [1, 3])
def test_accurate_is_exact_with_momentum_and_batch_norm(k: int) -> None:
    tasks = image_tasks((2, 3))
    inner = Inner(lr=LR, options=OPTIONS, schedule="cosine")
    trainer = make("accurate", tasks, horizon=5, rounds=3, seed=SEED, batch_size=BATCH, meta_lr=0.3, inner=inner)
    for _ in range(5):
        trainer.advance()
    twins = [copy.deepcopy(learner.module) for learner in trainer.learners]  # heads, statistics and momentum go on
    optimizers = [torch.optim.SGD(twin.parameters(), lr=LR, **OPTIONS) for twin in twins]
    for learner, twin, optimizer in zip(trainer.learners, twins, optimizers, strict=True):
        for name, parameter in {**learner.shared, **learner.own}.items():
            kept = learner.optimizer.state[parameter]["momentum_buffer"].clone()
            optimizer.state[twin.get_parameter(name)]["momentum_buffer"] = kept
    for _ in range(k):
        trainer.advance()
    phi = trainer.initialization  # U_k is taken of the phi that came out of k meta-updates
    for learner, twin, optimizer, task in zip(trainer.learners, twins, optimizers, tasks, strict=True):
        batches = TaskBatches(task, seed=SEED, batch_size=BATCH)
        with torch.no_grad():
            for name, tensor in phi.items():
                twin.get_parameter(name).copy_(tensor)
        for step in range(k):
            x, y = batches.train(5 + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / 5))
            optimizer.step()
        compare(dict(learner.module.named_parameters()), dict(twin.named_parameters()))
        compare(dict(learner.module.named_buffers()), dict(twin.named_buffers()))
