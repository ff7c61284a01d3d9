"""One local learner: a module whose shared parameters are a row of the matrix, its own state, its inner optimizer.

A learner's own state (head, parameters that not every task has, BatchNorm statistics and other buffers) never
travels between tasks. Shared parameters, and frozen ones that are the same in all tasks, are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trajshift.data.batches import TaskBatches
from trajshift.errors import UsageError
from trajshift.learners.inner_optimizer import (
    PARAMETER_SPACE_STATE,
    load_state_tensors,
    optimizer_for,
    set_lr,
    state_tensors,
)
from trajshift.learners.modules import fresh_module, head_key
from trajshift.learners.parameter_matrix import Trajectories
from trajshift.learners.sharing import Blueprint
from trajshift.rng import key, seed_generators
from trajshift.settings import Inner
from trajshift.task import Batch, Task

OWN = ("own/", "frozen/", "buffer/")
"""How names of a learner's own tensors begin."""


@contextmanager
def reentrant_checkpoints_named(task: str) -> Iterator[None]:
    """Explains torch's refusal of gradients for some parameters only where a module checkpoints reentrantly."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UsageError(
            f"the model of task {task!r} calls torch.utils.checkpoint with use_reentrant=True, which cannot "
            "differentiate for some parameters alone, as this method asks; use use_reentrant=False"
        ) from error


class Learner:
    """The local learner of one task, bound to one row of the parameter matrix."""

    def __init__(
        self,
        task: Task,
        batches: TaskBatches,
        blueprint: Blueprint,
        inner: Inner,
        *,
        seed: int,
        adapt_shared: bool,
        device: torch.device,
    ) -> None:
        self.task = task
        self.batches = batches
        self.inner = inner
        self.seed = seed
        self.device = device
        self.adapt_shared = adapt_shared
        self._blueprint = blueprint
        self.module = fresh_module(blueprint.factory, task, head_key(seed, task.name))
        named = dict(self.module.named_parameters())
        stored_once = blueprint.constants.place(self.module)
        shared = {entry.name for entry in blueprint.layout.entries}
        self.own = {name: p for name, p in named.items() if p.requires_grad and name not in shared}
        self.frozen = {name: p for name, p in named.items() if not p.requires_grad and name not in stored_once}
        for tensor in [p for name, p in named.items() if name not in shared and name not in stored_once]:
            tensor.data = tensor.data.to(device)
        for part in self.module.modules():
            part._buffers = {n: b if b is None else b.to(device) for n, b in part._buffers.items()}
        self.shared: dict[str, nn.Parameter] = {}
        self.optimizer: torch.optim.Optimizer
        self._flat: nn.Parameter | None = None

    # -- the row ---------------------------------------------------------------------------------------------

    def bind(self, trajectories: Trajectories, gradients: Tensor | None, row: int) -> None:
        """Moves into a row of theta `[T, P]`; `gradients` `[T, P]`, if given, receives what `gather` collects."""
        first_time = not self.shared
        self.row = row
        self._trajectories = trajectories
        self.shared = trajectories.bind(row, self.module)
        self._parameters = list(self.module.parameters())
        self._gradient_row = None if gradients is None else gradients[row]
        if self.inner.flat and self.adapt_shared:
            if self._flat is None:
                self._flat = nn.Parameter(trajectories.theta[row])
            self._flat.data = trajectories.theta[row]
        if first_time:
            self.renew_optimizer()

    def take(self, task: Task, batches: TaskBatches) -> None:
        """Continues the same task with other data, another loss or another weight.

        Raises:
            UsageError: another number of outputs, which the head does not fit.
        """
        if task.outputs != self.task.outputs:
            raise UsageError(
                f"task {task.name!r} came back with {task.outputs} outputs and has a head for {self.task.outputs}; "
                "give it another name"
            )
        self.task, self.batches = task, batches

    def check_module(self) -> None:
        """Rejects a module whose parameters no longer share memory with the parameter matrix or were replaced."""
        self._trajectories.check_parameters(self.row, self.module, {**self.shared, **self.own}, self.task.name)

    def renew_optimizer(self) -> None:
        """Forgets the inner optimizer's state."""
        parameters = [*self._optimized().values()]
        self.optimizer = optimizer_for(self.inner, parameters)

    def _optimized(self) -> dict[str, nn.Parameter]:
        if not self.adapt_shared:
            if not self.own:
                raise UsageError(f"task {self.task.name!r} has no parameters of its own for adapt head; use adapt all")
            return self.own
        if self._flat is not None:
            return {"(row)": self._flat, **self.own}
        return {**self.shared, **self.own}

    # -- one inner step --------------------------------------------------------------------------------------

    def forward(self, batch: Batch, autocast: torch.dtype | None = None) -> Tensor:
        """The training loss, a scalar."""
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            loss = self.task.compute_loss(self.module, batch)
        if loss.ndim != 0:
            raise UsageError(f"the loss of task {self.task.name!r} has shape {tuple(loss.shape)}; return one number")
        return loss

    def draw_of(self, step: int) -> int:
        """What the global generator is set to for a pass: dropout draws the same however a step is reached."""
        return key(self.seed, self.task.name, "forward", step)

    def seed_generators(self, step: int) -> None:
        """Sets the global generator for training batch `step`."""
        seed_generators(self.draw_of(step), self.device)

    def backward(self, batch: Batch, *, autocast: torch.dtype | None, shared: bool) -> Tensor:
        """Gradients of the loss on a batch; returns the loss, detached.

        With `shared` False only the task's own parameters get gradients.
        """
        loss = self.forward(batch, autocast)
        with reentrant_checkpoints_named(self.task.name):
            loss.backward(inputs=None if shared else list(self.own.values()))
        return loss.detach()

    def differentiate(self, loss: Tensor) -> None:
        """Gradients of a loss for the shared parameters alone."""
        loss.backward(inputs=list(self.shared.values()))

    def forget_gradients(self) -> None:
        """Frees the gradients, so that tasks that run one after another share their memory."""
        for parameter in self._parameters:  # module.zero_grad looks for them in every part of the module
            parameter.grad = None

    def pieces(self, row: Tensor) -> list[Tensor]:
        """A row `[P]` cut into the shared parameters' shapes, in their order."""
        return list(self._blueprint.layout.views(row).values())

    def add_proximal_gradient(self, phi: Tensor, strength: float) -> None:
        """Adds the gradient of `strength / 2 * ||theta - phi||^2` (iMAML's proximal term)."""
        towards = self._trajectories.layout.views(phi)
        for name, parameter in self.shared.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.data - towards[name], alpha=strength)

    def gather(self) -> None:
        """Copies the shared parameters' gradients into this learner's row; a missing one counts as zero."""
        assert self._gradient_row is not None
        slots = zip(self.pieces(self._gradient_row), self.shared.values(), strict=True)
        present = [(view, parameter.grad) for view, parameter in slots if parameter.grad is not None]
        if any(gradient.is_sparse for _, gradient in present):
            raise UsageError(f"task {self.task.name!r} has sparse gradients; use Embedding(sparse=False)")
        if len(present) < len(self.shared):
            self._gradient_row.zero_()
        torch._foreach_copy_([view for view, _ in present], [gradient for _, gradient in present])

    def clip(self, limit: float) -> None:
        """Scales all gradients of this task so that their joint norm is at most `limit`."""
        nn.utils.clip_grad_norm_([*self.shared.values(), *self.own.values()], limit)

    def step(self, lr: float | Tensor) -> None:
        """One step of the inner optimizer on the current gradients."""
        if self._flat is not None:
            missing = [name for name, parameter in self.shared.items() if parameter.grad is None]
            if missing:
                raise UsageError(
                    f"parameter {missing[0]!r} got no gradient in task {self.task.name!r}, and flat would decay it; "
                    "set flat=False"
                )
            self._flat.grad = self._gradient_row
        set_lr(self.optimizer, lr)
        self.optimizer.step()

    @property
    def has_state_to_shift(self) -> bool:
        """Whether the optimizer keeps state that lives in parameter space, which `shift_state` moves."""
        # All parameters have the same kinds of state, once they have any.
        kept: Mapping[str, Any] = next((state for state in self.optimizer.state.values() if state), {})
        return not PARAMETER_SPACE_STATE.isdisjoint(kept)

    def shift_state(self, delta: Mapping[str, Tensor]) -> None:
        """Moves optimizer state that lives in parameter space (averages, anchors) by delta."""
        for name, parameter in self.shared.items():
            for label, value in self.optimizer.state.get(parameter, {}).items():
                if label in PARAMETER_SPACE_STATE:
                    value.add_(delta[name])

    # -- state -----------------------------------------------------------------------------------------------

    def renew(self, what: frozenset[str], renewal: int) -> None:
        """Renews `heads` (and other parameters of its own), `statistics` (BatchNorm's) or `optimizer` state."""
        if "heads" in what:
            fresh = fresh_module(self._blueprint.factory, self.task, head_key(self.seed, self.task.name, renewal))
            values = dict(fresh.named_parameters())
            for name, parameter in self.own.items():
                parameter.data.copy_(values[name].data)
        if "statistics" in what:
            for part in self.module.modules():
                reset = getattr(part, "reset_running_stats", None)
                if reset is not None:
                    reset()
        if "optimizer" in what:
            self.renew_optimizer()

    def own_tensors(self) -> dict[str, Tensor]:
        """The task's own parameters (`own/NAME`; `frozen/NAME`) and buffers (`buffer/NAME`); not copies."""
        tensors = {f"own/{name}": parameter.data for name, parameter in self.own.items()}
        tensors |= {f"frozen/{name}": parameter.data for name, parameter in self.frozen.items()}
        return tensors | {f"buffer/{name}": buffer for name, buffer in self.module.named_buffers()}

    def load_own_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `own_tensors`, in place; other entries are ignored.

        Raises:
            UsageError: the tensors belong to another model.
        """
        mine = self.own_tensors()
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(OWN)}
        if not any(name.startswith("frozen/") for name in saved):  # versions before 0.2 did not save them
            saved |= {name: tensor.clone() for name, tensor in mine.items() if name.startswith("frozen/")}
        shapes, known = ({name: tuple(t.shape) for name, t in named.items()} for named in (mine, saved))
        for name in {**shapes, **known}:
            if shapes.get(name) != known.get(name):
                raise UsageError(
                    f"the saved state of task {self.task.name!r} belongs to another model: {name} has shape "
                    f"{known.get(name, 'missing')} there, {shapes.get(name, 'missing')} here; use that model"
                )
        for name, tensor in mine.items():
            tensor.copy_(saved[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that belongs to this learner except its row: own tensors and optimizer state; not copies."""
        tensors, numbers = state_tensors(self.optimizer, list(self._optimized()))
        return self.own_tensors() | {f"optimizer/{name}": tensor for name, tensor in tensors.items()}, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.load_own_tensors(tensors)
        prefix = "optimizer/"
        kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        load_state_tensors(self.optimizer, list(self._optimized()), kept, numbers)
