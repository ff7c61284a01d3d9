"""The usual way by hand: copied models, images transformed one by one in a DataLoader, parameter-by-parameter updates.

As a careful researcher writes it: no time is wasted beyond what this approach itself costs. With several processes each
trains its share of the tasks and the meta-updates are summed by gloo.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Steps
from benchmarks.workload import META_LR, PADDING, Workload, random_images, sgd


class Images(Dataset[tuple[Tensor, int]]):
    """Images uint8 `[N, H, W, C]`, each padded, cropped, flipped and normalised when asked for."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        height, width, _ = image.shape
        padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        top, left = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        image = padded[top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            image = image[:, ::-1]
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return x.float().div_(255.0).sub_(0.5).div_(0.5), self.labels[index]


def endless(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch, epoch after epoch."""
    while True:
        yield from loader


class Naive:
    """Trajectory shifting over this process's share of the tasks."""

    def __init__(self, workload: Workload) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            dist.init_process_group("gloo")
        rank = int(os.environ.get("RANK", "0"))
        self.workload = workload
        torch.manual_seed(0)
        first = workload.build(workload.build_tasks()[0])
        images, labels = random_images(workload.images, workload.size, workload.classes)
        dataset = Images(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist())
        self.models: list[nn.Module] = []
        self.loaders = []
        for task in range(rank, workload.tasks, self.size):
            torch.manual_seed(1 + task)
            model = copy.deepcopy(first)
            model.get_submodule("fc").reset_parameters()  # type: ignore[operator]
            self.models.append(model.train())
            self.loaders.append(
                endless(DataLoader(dataset, batch_size=workload.batch_size, shuffle=True, drop_last=True))
            )
        self.optimizers = [sgd(model.parameters()) for model in self.models]
        self.phi = {name: p.detach().clone() for name, p in first.named_parameters() if not name.startswith("fc.")}
        self.thetas = {name: [model.get_parameter(name) for model in self.models] for name in self.phi}
        self.step = 0

    def take(self, count: int) -> None:
        """Takes this many inner steps of all tasks, with a meta-update and a shift after each."""
        for _ in range(count):
            if self.step % self.workload.horizon == 0:
                self.reset()
            self.inner_step()
            self.meta_update()
            self.step += 1

    @torch.no_grad()
    def reset(self) -> None:
        """theta <- phi."""
        for name, phi in self.phi.items():
            for theta in self.thetas[name]:
                theta.copy_(phi)

    def inner_step(self) -> None:
        """One step of SGD on every task."""
        autocast = self.workload.autocast
        for model, optimizer, loader in zip(self.models, self.optimizers, self.loaders, strict=True):
            x, y = next(loader)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def meta_update(self) -> None:
        """phi and every theta move by delta = -beta * mean (phi - theta), parameter by parameter."""
        for name, phi in self.phi.items():
            delta = torch.zeros_like(phi)
            for theta in self.thetas[name]:
                delta.add_(theta).sub_(phi)
            if self.size > 1:
                dist.all_reduce(delta)
            delta.mul_(META_LR / self.workload.tasks)
            phi.add_(delta)
            for theta in self.thetas[name]:
                theta.add_(delta)


def steps(**workload: Any) -> Steps:
    """Steps of a new run."""
    return Naive(Workload(**workload)).take
