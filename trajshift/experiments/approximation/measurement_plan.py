"""What is measured: settings, grids and the recipe's two networks. This module never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, load, split_override

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("sgd", {}),
    "SGD with momentum": ("sgd", {"momentum": 0.9}),
    "Adam": ("adam", {}),
}
"""The inner optimizers, without weight decay."""
ADAM_FACTOR = 0.1
"""Adam's learning rates are those of SGD times this: its steps have about the length alpha in every coordinate."""
NETWORKS = {
    "ReLU, max-pool": {"activation": "relu", "pool": "max"},
    "Softplus, average-pool": {"activation": "softplus", "pool": "avg"},
}
"""Options of the small convolutional network that make it kinked or smooth."""
DISPLACEMENT, PRESCRIBED = "displacement", "prescribed"
DEFAULT_RECIPE = "digits"
DEFAULTS = ("train_on=[mirrored,few-classes]", "model.options.width=8", "model.options.batch_norm=false")
"""What the experiment overrides in its default recipe: two tasks of 8x8 pixels, no BatchNorm."""

USED = ("tasks", "train_on", "data", "model", "head", "shared", "batch_size")
"""Fields of a recipe that the experiment uses; all others follow from the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One line of one panel, at one of its points."""

    network: str
    """A name of `networks`."""
    optimizer: str
    """A name of `OPTIMIZERS`."""
    shifts: str
    """`displacement`: d_k = -beta mean(phi - theta_k), as in Algorithm 2; `prescribed`: length beta, one direction."""
    alpha: float
    """Inner learning rate."""
    beta: float
    """Meta-learning rate, or the length of the prescribed shifts."""
    carry: str = "shift"
    """What theta does: the library's `shift`, `hold`, or a name of `shifts.SHIFTS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementPlan:
    """The grids. Alpha and beta are varied one at a time, the other at its middle value."""

    alphas: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03)
    betas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    ks: tuple[int, ...] = (2, 3, 5, 10, 20, 50, 100, 200)
    draws: int = 10
    """Trajectories: each has its own start, batches and, for prescribed shifts, direction."""
    alpha: float = 0.01
    """Where beta is varied, and the better shifts are compared; one of `alphas`."""
    beta: float = 0.01
    """Where alpha is varied; one of `betas`."""
    shift_beta: float = 0.03
    """Where the better shifts are compared."""
    carries: tuple[str, ...] = ("shift", "hold", "velocity", "tangent", "diagonal", "scalar")

    @property
    def horizon(self) -> int:
        """Inner steps of a trajectory."""
        return max(self.ks)

    def settings(self, networks: Sequence[str]) -> list[Setting]:
        """All settings, each once."""
        points = [(alpha, self.beta) for alpha in self.alphas]
        points += [(self.alpha, beta) for beta in self.betas if beta != self.beta]
        kinds = [(optimizer, DISPLACEMENT) for optimizer in OPTIMIZERS] + [("SGD", PRESCRIBED)]
        grid = [
            Setting(network=network, optimizer=optimizer, shifts=shifts, alpha=alpha * scale(optimizer), beta=beta)
            for network in networks
            for optimizer, shifts in kinds
            for alpha, beta in points
        ]
        return grid + [
            Setting(
                network=network, optimizer="SGD with momentum", shifts="recorded",
                alpha=self.alpha, beta=self.shift_beta, carry=carry,
            )
            for network in networks
            for carry in self.carries
        ]  # fmt: skip


QUICK = MeasurementPlan(alphas=(0.003, 0.01), betas=(0.01, 0.03), ks=(2, 5, 10, 20), draws=2)
"""A check of the command, not a result."""


def scale(optimizer: str) -> float:
    """The factor on the grid's alpha for an optimizer."""
    return ADAM_FACTOR if optimizer == "Adam" else 1.0


def chosen_recipe(recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe whose tasks, model and batch size are used; none means the default one with `DEFAULTS`.

    Raises:
        UsageError: the recipe does not fit, or an override would be ignored.
    """
    defaults = DEFAULTS if recipe is None else ()
    loaded = load(recipe or DEFAULT_RECIPE, [*defaults, *overrides])
    left_out = set(loaded.tasks) - set(loaded.source_tasks())
    for override in overrides:
        path, _ = split_override(override)
        if path[0] not in USED:
            raise UsageError(
                f"{'.'.join(path)} is set, but this experiment does not use it, only {', '.join(USED)}; drop it"
            )
        if path[0] == "tasks" and path[1:] and path[1] in left_out:
            raise UsageError(f"{'.'.join(path)} is set, but train_on leaves {path[1]!r} out; add it, or drop the field")
    return loaded


def used_fields(recipe: Recipe) -> dict[str, Any]:
    """What the experiment uses of a recipe, as plain values."""
    tasks = {name: asdict(task) for name, task in recipe.source_tasks().items()}
    whole = asdict(recipe) | {"tasks": tasks}
    return {name: whole[name] for name in USED}


def networks(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Model options by name: kinked and smooth for `conv`, and the model as it is for any other.

    Raises:
        UsageError: `conv` with an activation or pooling set in the recipe, although both are compared.
    """
    if recipe.model.name != "conv":
        return {recipe.model.name: {}}
    for option in ("activation", "pool"):
        if option in recipe.model.options:
            raise UsageError(f"model.options.{option} is set, but both networks are measured; drop it")
    return NETWORKS


def key_of(setting: Setting, draw: int) -> str:
    """Names one unit of work in the results' file."""
    return "|".join(f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(setting).values()) + (
        f"|{draw}"
    )
