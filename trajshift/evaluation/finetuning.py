"""Meta-test: train a task from an initialization and test it (Shin et al., 2021, sections 4.2 and 4.3)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from trajshift.data.batches import TaskBatches
from trajshift.data.loader import PrefetchLoader
from trajshift.data.sources import Source, as_source, class_balanced_subset, subset
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.learners.constants import constants, drawn
from trajshift.learners.initialization import Initialization, tensor_names
from trajshift.learners.inner_optimizer import optimizer_class, optimizer_for, set_lr
from trajshift.learners.modules import (
    Factory,
    as_factory,
    faster_channels_last,
    fresh_module,
    head_key,
    phi_key,
    refuse_common_memory,
    to_channels_last,
)
from trajshift.learners.sharing import doubt_of_head, find_heads, is_in_head
from trajshift.rng import key, repeatable, seed_generators
from trajshift.settings import Finetune, finetune_settings
from trajshift.task import Task
from trajshift.utils.cpu_memory import keep_memory

CALIBRATION_BATCHES = 100
CURVE_POINTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuned:
    """The result of fine-tuning one task."""

    module: nn.Module
    """The trained module, on the device, in evaluation mode."""
    metrics: dict[str, float]
    """Means over the whole test set (`accuracy` in [0, 1] and `loss`, or `mse`); empty without a test set."""
    curve: list[dict[str, float]]
    """Learning curve: `step`, `train_loss` (mean since the previous point), test metrics where asked for."""
    images: int
    """Training examples used."""
    started_from: tuple[str, ...]
    """Parameters that the initialization filled."""
    fresh: tuple[str, ...]
    """Trainable parameters that it did not (the head): drawn from (seed, task)."""

    def save(self, path: str | Path) -> Path:
        """Writes the module's parameters and buffers as a safetensors file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(self.module, str(path))
        return path


def finetune(
    initialization: Initialization | Mapping[str, Tensor] | None,
    task: Task,
    settings: Finetune | None = None,
    *,
    model: Factory | nn.Module | None = None,
    head: str | Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    workers: int = 0,
    evaluate_every: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> FineTuned:
    """Trains `task` from an initialization and tests the result.

    The defaults are the paper's meta-test: SGD with Nesterov momentum 0.9 and weight decay 5e-4, the learning
    rate multiplied by `factor` at each milestone, fresh BatchNorm statistics. Every parameter is trained, the
    head from a fresh start that depends on (seed, task) alone. Batches, augmentation and dropout are those of
    (seed, task, step), hence the same for every initialization.

    ```python
    tuned = trajshift.finetune(trainer.initialization, task, steps=300, seed=0)
    tuned = trajshift.finetune(trainer.initialization, task, trajshift.Finetune(steps=300), seed=0)  # the same
    print(tuned.metrics["accuracy"])
    ```

    Args:
        initialization: phi; None trains from scratch, from the phi that a `MetaTrainer` of this seed starts
            with.
        task: with test examples if metrics are wanted. Its own batch size overrides that of the settings.
        settings: how; None takes `fields`.
        model: as for `MetaTrainer`; None takes the factory the initialization was learned with.
        head: dotted name(s) of the head; None takes the initialization's, else finds the usual ones.
        seed: decides head, batches, subset and, without an initialization, the body.
        device: where to train.
        dtype: of the parameters; None takes the model's, whatever that of the initialization.
        workers: processes that load examples which are not in memory.
        evaluate_every: add the test metrics to the curve each time this many steps are done.
        progress: called with (steps done, steps).
        fields: the fields of `trajshift.Finetune`, in place of `settings`.

    Raises:
        UsageError: an initialization that does not fit the model, an impossible choice, or both fields and settings.
        NonFiniteLoss: the training loss became infinite or not a number; names the step and the learning
            rate.
    """
    settings = finetune_settings(settings, fields, set(signature(finetune).parameters) - {"fields"})
    optimizer_class(settings.optimizer)  # fails before anything is built
    device = torch.device(device)
    module, started_from, fresh = build_module(initialization, task, model=model, head=head, seed=seed, dtype=dtype)
    if faster_channels_last(module):
        to_channels_last(module)
    if device.type == "cpu":
        keep_memory()
    module.to(device)
    images = training_images(task, settings.train_images)
    task = few(task, settings.train_images, seed)
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    batches = TaskBatches(task, seed=seed, batch_size=settings.batch_size, device=device, dtype=kind)
    with repeatable(device), closing(PrefetchLoader({task.name: batches}, workers)):
        start_statistics(module, task, batches, settings.running_stats, initialization)
        training = _Training(module, task, batches, settings, seed)
        curve = training.run(evaluate_every, progress)
        metrics = test_metrics(module, task, batches) if task.test is not None else {}
    return FineTuned(
        module=module.eval(),
        metrics=metrics,
        curve=curve,
        images=images,
        started_from=started_from,
        fresh=fresh,
    )


def build_module(
    initialization: Initialization | Mapping[str, Tensor] | None,
    task: Task,
    *,
    model: Factory | nn.Module | None,
    head: str | Sequence[str] | None,
    seed: int,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The module at the start of fine-tuning, the names the initialization filled, and the fresh ones.

    What the initialization has comes from there; without one, all but the head comes from the draw behind a trainer's
    first phi, and so do random constants that it lacks; the rest from (seed, task).
    """
    if model is None:
        model = getattr(initialization, "model", None)
    if model is None:
        raise UsageError(
            "the model is not known: an initialization read from a file needs model=, the factory it was learned with"
        )
    head = head or list(getattr(initialization, "about", {}).get("heads", ())) or None
    factory = as_factory(model, head)
    module = fresh_module(factory, task, head_key(seed, task.name))
    other = fresh_module(factory, task, phi_key(seed))
    refuse_common_memory(module, other, task.name, task.name)
    random = drawn(module, other)
    module = module.to(dtype=dtype)
    first = dict(other.named_parameters())
    # Parameters that the initialization leaves out are fresh anyway: a head has to be known only for scratch.
    heads = find_heads(module, head, None if initialization is None else ("*",))
    started, fresh = [], []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if initialization is None and not is_in_head(name, heads):
                parameter.copy_(first[name])
            elif initialization is not None and name in initialization and not is_in_head(name, heads):
                _fill(name, parameter, initialization[name], task)
                started.append(name)
            else:
                fresh.append(name)
        constant = _fill_constants(module, other, random, initialization or {}, task, heads)
    if initialization is not None:
        _check_used(module, initialization, started, heads)
        if head is None and (doubt := doubt_of_head(factory, task, seed, heads, started)):
            print(f"warning: {doubt}", file=sys.stderr)
    return module, (*started, *constant), tuple(fresh)


def _fill_constants(
    module: nn.Module,
    other: nn.Module,
    random: Collection[str],
    initialization: Mapping[str, Tensor],
    task: Task,
    heads: Sequence[str],
) -> list[str]:
    """Frozen parameters, and buffers that are no statistics: from the initialization, else from phi's draw.

    Those that the factory gives every task alike, or this task in particular, are in the module already.
    Returns the names of the parameters that the initialization filled.
    """
    built = getattr(initialization, "about", {}).get("built", ())
    parameters, first, filled = dict(module.named_parameters()), constants(other), []
    for name, tensor in constants(module).items():
        given = initialization[name] if name in initialization and name not in built else None
        must_fit = not is_in_head(name, heads) and (name in parameters or name in random)
        if given is not None and (must_fit or given.shape == tensor.shape):
            _fill(name, tensor, given, task)
            filled += [name] if name in parameters else []
        elif name in random:
            tensor.copy_(first[name])
    return filled


def _fill(name: str, tensor: Tensor, value: Tensor, task: Task) -> None:
    if value.shape != tensor.shape:
        raise UsageError(
            f"the initialization has {name!r} with shape {tuple(value.shape)}, the model for task {task.name!r} with "
            f"{tuple(tensor.shape)}; use the model and the number of channels it was learned with"
        )
    tensor.copy_(value)


def _check_used(
    module: nn.Module, initialization: Mapping[str, Tensor], started: Sequence[str], heads: Sequence[str]
) -> None:
    known = tensor_names(module)
    unused = [name for name in initialization if name not in known and not is_in_head(name, heads)]
    if unused or not started:
        which = f"{unused[0]!r}" if unused else "any trainable parameter"
        raise UsageError(
            f"the initialization does not fit: {type(module).__name__} has no place for {which}; "
            "use the model it was learned with"
        )


def few(task: Task, train_images: int | None, seed: int) -> Task:
    """The task with a class-balanced subset of its training examples.

    The subset depends on (seed, task name) alone, and a smaller one is part of a larger one; asking for more
    examples than there are gives all.
    """
    source = _training_source(task)
    if train_images is None or train_images >= len(source):
        return replace(task, train=source)
    chosen = class_balanced_subset(source, train_images, key(seed, task.name, "subset"))
    return replace(task, train=subset(source, chosen))


def training_images(task: Task, train_images: int | None) -> int:
    """How many training examples `few` leaves."""
    count = len(_training_source(task))
    return count if train_images is None else min(train_images, count)


def _training_source(task: Task) -> Source:
    return as_source(task.train, what=f"the training set of task {task.name!r}")


def test_metrics(module: nn.Module, task: Task, batches: TaskBatches) -> dict[str, float]:
    """Means of the task's metrics over its whole test set, the last partial batch included."""
    sums: dict[str, Tensor] = {}
    count = 0
    training = module.training
    module.eval()
    with torch.no_grad():
        for step, batch in enumerate(batches.test()):
            seed_generators(key(batches.seed, batches.name, "test", step), batches.device)
            size = len(tree_leaves(batch)[0])
            for name, value in task.compute_metrics(module, batch).items():
                sums[name] = sums.get(name, 0.0) + value.detach().cpu().double() * size
            count += size
    module.train(training)
    return {name: float(value) / count for name, value in sums.items()}


def start_statistics(
    module: nn.Module,
    task: Task,
    batches: TaskBatches,
    running_stats: str,
    initialization: Mapping[str, Tensor] | None,
) -> None:
    """BatchNorm statistics as fine-tuning starts with them; nothing to do for a module that keeps none."""
    parts: list[tuple[str, Any]] = [(name, part) for name, part in module.named_modules() if _keeps_statistics(part)]
    if running_stats == "keep":
        _keep(parts, initialization)
        return
    for _, part in parts:
        part.reset_running_stats()
    if running_stats == "recalibrate" and parts:
        _recalibrate(module, task, [part for _, part in parts], batches)


def _keeps_statistics(part: nn.Module) -> bool:
    return isinstance(getattr(part, "running_mean", None), Tensor) and hasattr(part, "reset_running_stats")


def _keep(parts: Sequence[tuple[str, Any]], initialization: Mapping[str, Tensor] | None) -> None:
    """Statistics of the initialization, where it has them, else those the module was built with."""
    if initialization is None:
        return
    for name, part in parts:
        labels = {label: f"{name}.{label}" if name else label for label, _ in part.named_buffers(recurse=False)}
        found = {label: initialization[full] for label, full in labels.items() if full in initialization}
        for label, value in found.items():
            getattr(part, label).copy_(value)
        # As in a new module: keep would silently mean reset.
        if not found and int(getattr(part, "num_batches_tracked", None) or 0) == 0:
            raise UsageError(
                f"running_stats is keep, but neither the initialization nor the model has statistics for {name!r}; "
                "use reset (as published) or recalibrate"
            )


def _recalibrate(module: nn.Module, task: Task, parts: Sequence[Any], batches: TaskBatches) -> None:
    """Means of the batch statistics over one pass of the training examples, all batches with one weight."""
    momenta = [part.momentum for part in parts]
    for part in parts:
        part.momentum = None  # torch: the cumulative mean
    module.train()
    count = min(-(-batches.size // batches.batch_size), CALIBRATION_BATCHES)
    with torch.no_grad():
        for step in range(count):
            seed_generators(key(batches.seed, batches.name, "recalibrate", step), batches.device)
            task.compute_loss(module, batches.train(step))
    for part, momentum in zip(parts, momenta, strict=True):
        part.momentum = momentum


class _Training:
    """The plain training loop, with its learning curve."""

    def __init__(self, module: nn.Module, task: Task, batches: TaskBatches, settings: Finetune, seed: int) -> None:
        self.module, self.task, self.batches, self.settings = module, task, batches, settings
        self.seed, self.steps = seed, settings.steps
        self.curve: list[dict[str, float]] = []
        self._losses: list[Tensor] = []

    def run(self, evaluate_every: int | None, progress: Callable[[int, int], None] | None) -> list[dict[str, float]]:
        """Takes all steps; returns the curve."""
        self.module.train()
        optimizer = optimizer_for(self.settings, [p for p in self.module.parameters() if p.requires_grad])
        every = max(1, self.steps // CURVE_POINTS)
        for step in range(self.steps):
            set_lr(optimizer, self.settings.lr_at(step / self.steps))
            self._step(optimizer, step)
            done = step + 1
            tested = evaluate_every is not None and done % evaluate_every == 0
            if done % every == 0 or done == self.steps or tested:
                self._point(done, tested=tested)
            if progress is not None:
                progress(done, self.steps)
        return self.curve

    def _step(self, optimizer: Optimizer, step: int) -> None:
        batch = self.batches.train(step)
        seed_generators(key(self.seed, self.task.name, "forward", step), self.batches.device)
        optimizer.zero_grad(set_to_none=True)
        loss = self.task.compute_loss(self.module, batch)
        loss.backward()
        optimizer.step()
        self._losses.append(loss.detach())

    def _point(self, done: int, *, tested: bool) -> None:
        """One point of the curve; the only place where the losses are read."""
        losses = torch.stack(self._losses).cpu().double()
        self._losses.clear()
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            at = done - len(losses) + int(bad[0])
            raise NonFiniteLoss(
                f"fine-tuning {self.task.name!r}: the loss at step {at + 1} is {float(losses[int(bad[0])])} with "
                f"learning rate {self.settings.lr_at(at / self.steps):g}; lower lr"
            )
        point = {"step": float(done), "train_loss": float(losses.mean())}
        self.curve.append(point | (test_metrics(self.module, self.task, self.batches) if tested else {}))
