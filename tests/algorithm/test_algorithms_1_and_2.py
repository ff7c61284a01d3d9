"""Every engine against `trajshift.algorithm.algorithms_1_and_2`: separate modules, torch.optim, no parameter matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.learners import ConvNet, SideBySide, everything, image_tasks, make
from tests.helpers.recording import Recorder
from trajshift import METHODS, Inner, MetaTrainer, Task
from trajshift.algorithm.algorithms_1_and_2 import (
    LocalLearner,
    Parameters,
    algorithm_1,
    algorithm_2,
    displacement,
    last_gradient,
)
from trajshift.data.batches import TaskBatches
from trajshift.rng import key, normal
from trajshift.training.engines.cuda_graph import Graph
from trajshift.training.engines.loop import Engine

HORIZON, ROUNDS, SEED, BATCH = 10, 5, 4, 5
OPTIONS = {"momentum": 0.9, "weight_decay": 5e-4}
LR, META_LR = 0.0625, 0.2  # a rate that float32 holds exactly, as a recorded step reads it


def factory(task: Task) -> nn.Module:
    """Its body is the same for all tasks, its head depends on the number of classes alone."""
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    module = ConvNet(task)
    torch.random.set_rng_state(state)
    return module


def reference(
    tasks: list[Task], phi: Parameters, method: str, trainer: MetaTrainer
) -> tuple[list[LocalLearner], Iterator[int]]:
    """Learners with modules and optimizers of their own, and the algorithm that runs them."""
    total = sum(task.weight for task in tasks)

    def learner(task: Task) -> LocalLearner:
        module = copy.deepcopy(factory(task)).train()
        batches = TaskBatches(task, seed=SEED, batch_size=BATCH)

        def loss(module: nn.Module, step: int) -> Tensor:
            x, y = batches.train(step)
            return nn.functional.cross_entropy(module(x), y)

        optimizer = torch.optim.SGD(module.parameters(), lr=LR, **OPTIONS)
        return LocalLearner(module, optimizer, loss, task.weight / total)

    def direction(t: int, step: int) -> Parameters:
        """The draw that random shifting documents: a function of (seed, task, steps done)."""
        drawn = normal(key(SEED, tasks[t].name, "direction", step + 1), len(trainer.phi), dtype=torch.float64)
        return trainer.layout.views(drawn)

    learners = [learner(task) for task in tasks]
    sizes = {"meta_lr": META_LR, "horizon": HORIZON, "rounds": ROUNDS}
    if method in ("reptile", "fomaml"):
        gradient = last_gradient if method == "fomaml" else displacement
        return learners, algorithm_1(phi, learners, **sizes, meta_gradient=gradient)
    carry = METHODS[method].carry
    return learners, algorithm_2(phi, learners, **sizes, carry=carry, direction=direction)


def recorded(trainer: MetaTrainer) -> Engine:
    """The engine of recorded steps, on the stand-in for a device; the loop where a step cannot be recorded."""
    return Engine() if Graph.obstacle(trainer.meta_step) else Graph(Recorder())


ENGINES = {"loop": lambda trainer: Engine(), "parallel": lambda trainer: SideBySide(), "graph": recorded}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flat", [False, True], ids=["per parameter", "flat"])
@pytest.mark.parametrize(
    "method", ["trajectory-shifting", "no-shifting", "random-shifting", "accurate", "reptile", "fomaml"]
)
def test_fifty_steps_agree(method: str, flat: bool, engine: str) -> None:
    tasks = image_tasks((2, 3, 5))
    tasks[1].weight = 2.0
    inner = Inner(lr=LR, options=OPTIONS, flat=flat)
    sizes = {"horizon": HORIZON, "rounds": ROUNDS, "batch_size": BATCH}
    trainer = make(method, tasks, factory, seed=SEED, meta_lr=META_LR, inner=inner, engine="loop", **sizes)
    trainer.engine = ENGINES[engine](trainer)
    before = trainer.initialization
    phi = {name: tensor.clone() for name, tensor in before.items()}
    learners, steps = reference(tasks, phi, method, trainer)
    for event, k in zip(trainer, steps, strict=True):
        assert event.k == k
        compare(trainer.layout.views(trainer.phi), phi)
        for ours, theirs in zip(trainer.learners, learners, strict=True):
            compare(dict(ours.module.named_parameters()), dict(theirs.module.named_parameters()))
            compare(dict(ours.module.named_buffers()), dict(theirs.module.named_buffers()))
    assert event.step == HORIZON * ROUNDS
    assert max((before[name] - phi[name]).abs().max() for name in phi) > 1e-2  # it did train


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
