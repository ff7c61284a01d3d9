"""The limit: the same learners trained plainly, no meta-learning at all, in ordinary PyTorch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from benchmarks.workload import sgd
from trajshift import MetaTrainer


class Plain:
    """Trains copies of the models of a trainer that has taken a step, on its batches, from its current state."""

    def __init__(self, trainer: MetaTrainer) -> None:
        self.device, self.autocast = trainer.device.type, trainer.meta_step.autocast
        self.models = [copy.deepcopy(learner.module) for learner in trainer.learners]
        self.batches = [learner.batches for learner in trainer.learners]
        self.optimizers = [sgd(model.parameters(), fused=True) for model in self.models]
        self.step = trainer.step

    def take(self, count: int) -> None:
        """Takes this many steps of every model."""
        for _ in range(count):
            for model, optimizer, batches in zip(self.models, self.optimizers, self.batches, strict=True):
                x, y = batches.train(self.step)
                with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
