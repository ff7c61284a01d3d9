"""The limit: the same learners trained plainly, no meta-learning at all, in ordinary PyTorch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from benchmarks.harness import Steps
from benchmarks.workload import INNER_LR, INNER_OPTIONS
from trajshift import MetaTrainer


def plain(trainer: MetaTrainer) -> Steps:
    """Trains copies of the models of a trainer that has taken a step, on its batches, from where it stands."""
    device, autocast = trainer.device.type, trainer.autocast
    models = [copy.deepcopy(learner.module) for learner in trainer.learners]
    batches = [learner.batches for learner in trainer.learners]
    optimizers = [torch.optim.SGD(m.parameters(), lr=INNER_LR, fused=True, **INNER_OPTIONS) for m in models]
    step = trainer.step

    def take(count: int) -> None:
        nonlocal step
        for _ in range(count):
            for model, optimizer, source in zip(models, optimizers, batches, strict=True):
                x, y = source.train(step)
                with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            step += 1

    return take
