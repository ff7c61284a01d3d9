"""Options, stated once: these classes are sections of a recipe and arguments in Python.

    MetaTrainer(model, tasks, inner=Inner(lr=0.02), meta=Meta(lr=0.1), execution=Execution(device="cuda"))
    finetune(phi, task, Finetune(steps=300))

A recipe writes the same as `inner: {lr: 0.02}`. Nothing here imports torch, pydantic or YAML: the name of an optimizer
is checked against torch.optim by `trajshift.learners.inner_optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from trajshift.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    OptimizerChoice = str | Callable[..., Optimizer]
    Schedule = str | Callable[[float], float]
    Device = str | torch.device
    DataType = str | torch.dtype
    OwnObject = Any
else:
    # A recipe can only hold the strings; pydantic reads this half.
    OptimizerChoice = Schedule = Device = DataType = OwnObject = str

FORBID_UNKNOWN = {"extra": "forbid"}
"""The pydantic configuration of every section of a recipe."""
SCHEDULES = ("constant", "cosine", "step")
ENGINES = ("auto", "loop", "parallel", "graph")
AUTOCAST = ("bfloat16", "float16")
RUNNING_STATS = ("reset", "keep", "recalibrate")
ELEMENTWISE = ("SGD", "Adam", "AdamW", "RMSprop")
"""Optimizers that treat every number alike, so that a whole row of the parameter matrix may be one parameter."""

SHORT_NAMES = {
    "meta_lr": "meta.lr",
    "meta_every": "meta.every",
    "metagrad": "meta.gradient",
    "metagrad_options": "meta.gradient_options",
    "carry": "meta.carry",
    "adapt": "meta.adapt",
    "batch": "meta.batch",
    "grad_clip": "inner.grad_clip",
    "device": "execution.device",
    "engine": "execution.engine",
    "autocast": "execution.autocast",
    "channels_last": "execution.channels_last",
    "workers": "execution.workers",
    "overlap": "execution.overlap",
    "threads": "execution.threads",
}
"""Names that version 0.1 used at the top of a recipe and as arguments of `MetaTrainer`, and where these fields are now.
Recipes and overrides still accept them; run fingerprints and report labels are built from them."""
RENAMED = {"meta_optimizer": "meta.optimizer", "meta_options": "meta.options", "gauge": "error_meter"}
"""Like SHORT_NAMES, for `MetaTrainer` only."""


# -- checks --------------------------------------------------------------------------------------------------


def at_least(where: str, value: float | None, least: float, unit: str = "") -> None:
    """Refuse a number below `least`; None passes."""
    if value is not None and not value >= least:
        raise UsageError(f"{where} is {value}; it must be at least {least}{' ' + unit if unit else ''}")


def positive(where: str, value: float | None) -> None:
    """Refuse a number that is not positive and finite; None passes."""
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{where} is {value}; use a positive number")


def one_of(where: str, value: str | None, known: Collection[str]) -> None:
    """Refuse a word outside `known`, naming the nearest; None passes."""
    if value is not None and value not in known:
        raise UsageError(f"{where} is {value!r}, which is unknown{nearest(value, known)}")


# -- the sections --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """What `Inner` and `Finetune` have in common: an optimizer and the schedule of its learning rate.

    Raises:
        UsageError: a number out of range or an unknown schedule. The optimizer is checked where it is used.
    """

    __pydantic_config__ = FORBID_UNKNOWN
    SGD_OPTIONS: ClassVar[Mapping[str, Any]] = {"momentum": 0.9, "weight_decay": 5e-4}
    """The options of SGD if none are given, as in the paper."""

    optimizer: OptimizerChoice = "sgd"
    """A first-order torch.optim class without a closure, by name; in Python also a callable that takes the parameters,
    lr and the options."""

    lr: float = 0.01
    """Learning rate before the schedule."""

    options: dict[str, Any] | None = None
    """Further arguments of the optimizer; null means the paper's (SGD_OPTIONS) for SGD and none for others, {} none."""

    schedule: Schedule = "constant"
    """What multiplies lr: constant, cosine or step; in Python also a function of the fraction done, in [0, 1)."""

    milestones: Sequence[float] = (0.4, 0.7, 0.9)
    """For step: the fractions of the steps at which lr is multiplied by factor."""

    factor: float = 0.3
    """For step: what lr is multiplied by at each milestone."""

    def __post_init__(self) -> None:
        section = type(self).__name__.lower()
        positive(f"{section}.lr", self.lr)
        if isinstance(self.schedule, str):
            one_of(f"{section}.schedule", self.schedule, SCHEDULES)
        positive(f"{section}.factor", self.factor)
        for share in self.milestones:
            if not 0 <= share <= 1:
                raise UsageError(
                    f"{section}.milestones contains {share}; each must be a fraction of the steps, from 0 to 1"
                )
        given = self.default_options(self.optimizer) if self.options is None else self.options
        # A section is frozen: instances are defaults of arguments, and checkpoints depend on them.
        object.__setattr__(self, "options", dict(given))
        object.__setattr__(self, "milestones", list(self.milestones))

    @classmethod
    def default_options(cls, optimizer: OptimizerChoice) -> dict[str, Any]:
        """The options used with this optimizer when `options` is not given."""
        if not isinstance(optimizer, str) and getattr(optimizer, "__module__", "").startswith("torch.optim"):
            optimizer = optimizer.__name__
        return dict(cls.SGD_OPTIONS) if isinstance(optimizer, str) and optimizer.lower() == "sgd" else {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The optimizer's arguments besides lr: `options`, with the defaults filled in."""
        return dict(self.options or {})

    def lr_at(self, fraction: float) -> float:
        """The learning rate once `fraction` of the steps, in [0, 1), is done."""
        if callable(self.schedule):
            return self.lr * self.schedule(fraction)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * fraction))
        if self.schedule == "step":
            return self.lr * self.factor ** sum(fraction >= milestone for milestone in self.milestones)
        return self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner(Optimization):
    """How a local learner takes its inner steps. The schedule runs over one horizon.

    Raises:
        UsageError: see `Optimization`; also `flat` for an optimizer that is not elementwise.
    """

    flat: bool = False
    """Run the optimizer on a whole row of the parameter matrix at once; for SGD, Adam, AdamW and RMSprop."""

    grad_clip: float | None = None
    """Largest gradient norm of a task in an inner step; null does not clip."""

    def __post_init__(self) -> None:
        Optimization.__post_init__(self)  # super() does not work in a class with slots before Python 3.14
        positive("inner.grad_clip", self.grad_clip)
        known = [name.lower() for name in ELEMENTWISE] if isinstance(self.optimizer, str) else ELEMENTWISE
        name = self.optimizer.lower() if isinstance(self.optimizer, str) else getattr(self.optimizer, "__name__", "")
        if self.flat and name not in known:
            raise UsageError(
                f"inner.flat is for elementwise optimizers ({', '.join(ELEMENTWISE)}), not {self.optimizer}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """How phi moves: overrides the method's choices, and names phi's optimizer.

    A choice left null is taken from the method (`trajshift methods` lists the methods).
    """

    __pydantic_config__ = FORBID_UNKNOWN

    lr: float | None = None
    """Meta-learning rate (beta); null takes the method's, printed at the start."""

    every: int | None = None
    """Inner steps between meta-updates, a divisor of horizon."""

    gradient: OwnObject | None = None
    """Meta-gradient: displacement, last_gradient, path_length or implicit; `package.module:factory`, which is called
    with gradient_options and returns a `trajshift.MetaGradient`; in Python also such an object."""

    gradient_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the meta-gradient, such as Leap's norm or iMAML's strength."""

    carry: OwnObject | None = None
    """What the running theta does once phi has moved: shift, hold, random or replay; `package.module:factory`, which is
    called without arguments and returns a `trajshift.Carry`; in Python also such an object."""

    adapt: str | None = None
    """Which parameters the inner step moves: all or head."""

    batch: str | None = None
    """Batches on which a gradient at theta is taken: train (the last inner step's) or heldout."""

    optimizer: OptimizerChoice | None = None
    """As inner.optimizer, but given the meta-gradient; null is the plain step phi <- phi - lr * g."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that optimizer."""

    def __post_init__(self) -> None:
        positive("meta.lr", self.lr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """Where and how the steps run. Apart from `overlap`, nothing here changes the results beyond rounding."""

    __pydantic_config__ = FORBID_UNKNOWN

    device: Device = "cpu"
    """A torch device, such as cpu or cuda."""

    engine: OwnObject = "auto"
    """How the steps are run: loop (one task after another), parallel (side by side on the CPU's threads), graph (CUDA
    graphs) or auto, the fastest that can run this; in Python also an engine object."""

    autocast: DataType | None = None
    """bfloat16 or float16 for the forward passes; null keeps the parameters' type. In Python also a torch dtype."""

    channels_last: bool | None = None
    """Keep the weights and activations of convolutions channels-last; null does so where that is faster."""

    workers: int = 0
    """Processes that load sources too large for memory; 0 loads in the training process."""

    overlap: bool = False
    """Let the ranks sum a meta-gradient while the next inner step runs. This changes the numbers: inside a round phi
    and theta move one inner step late."""

    threads: int | None = None
    """CPU threads of each process. Null: the command line divides the cores among its processes, and in Python torch's
    own setting is kept. Results may differ in the last bits between thread counts."""

    def __post_init__(self) -> None:
        if isinstance(self.engine, str):
            one_of("execution.engine", self.engine, ENGINES)
        if isinstance(self.autocast, str):
            one_of("execution.autocast", self.autocast, AUTOCAST)
        at_least("execution.workers", self.workers, 0)
        at_least("execution.threads", self.threads, 1, "thread")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune(Optimization):
    """Meta-test: how a task is trained from an initialization; the defaults are those of the paper's section 4.2.

    Raises:
        UsageError: see `Optimization`.
    """

    SGD_OPTIONS: ClassVar[Mapping[str, Any]] = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    """Those of meta-training, with Nesterov momentum."""

    steps: int = 1000
    """Training steps; 0 tests the initialization as it is."""

    batch_size: int = 128
    """Examples per step."""

    lr: float = 0.1
    """Learning rate at the start."""

    schedule: Schedule = "step"
    """As inner.schedule, over the steps of fine-tuning."""

    running_stats: str = "reset"
    """BatchNorm statistics at the start. reset: fresh, as published. keep: those of the initialization or of the
    model. recalibrate: means over one pass of the training examples (at most 100 batches) through the start."""

    train_images: int | None = None
    """Train on a class-balanced subset of at most this many examples, the same for every initialization; null: all."""

    def __post_init__(self) -> None:
        Optimization.__post_init__(self)
        at_least("finetune.steps", self.steps, 0, "steps")
        at_least("finetune.batch_size", self.batch_size, 1, "example")
        at_least("finetune.train_images", self.train_images, 1, "image")
        one_of("finetune.running_stats", self.running_stats, RUNNING_STATS)


SECTIONS: dict[str, type] = {"inner": Inner, "meta": Meta, "execution": Execution, "finetune": Finetune}
"""The sections by their names in a recipe."""


# -- arguments -----------------------------------------------------------------------------------------------


def finetune_settings(settings: Finetune | None, given: Mapping[str, Any], others: Collection[str] = ()) -> Finetune:
    """The settings of a fine-tuning, from an object or from its fields as keywords.

    Args:
        settings: all fields, or None.
        given: keyword arguments, those in `others` excluded.
        others: keywords that are not fields, so that the nearest name to an unknown one can be suggested.

    Raises:
        UsageError: an unknown keyword, or a field given together with an object, which already states every field.
    """
    known = [entry.name for entry in fields(Finetune)]
    for name in given:
        if name not in known:
            raise UsageError(f"finetune has no argument {name!r}{nearest(name, [*known, *others])}")
    if settings is None:
        return Finetune(**given)
    if not isinstance(settings, Finetune):
        raise UsageError(f"finetune was given a {type(settings).__name__} as settings; use trajshift.Finetune")
    for name, value in given.items():
        raise UsageError(
            f"finetune was given {name} twice, as {_shown(getattr(settings, name))} in a Finetune, which states every "
            f"field, and as {name}={_shown(value)}; use dataclasses.replace(settings, {name}={_shown(value)})"
        )
    return settings


def refuse_unknown_arguments(function: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Name the new spelling of arguments of version 0.1, and the nearest name of any other.

    Raises:
        UsageError: `given` is not empty.
    """
    moved = {name: path for name, path in (SHORT_NAMES | RENAMED).items() if name in given}
    for name in given:
        if name not in moved:
            raise UsageError(f"{function} has no argument {name!r}{nearest(name, known)}")
    new: dict[str, list[str]] = {}
    for name, path in moved.items():
        section, _, entry = path.partition(".")
        new.setdefault(section, []).append(f"{entry}={_shown(given[name])}" if entry else _shown(given[name]))
    words = [
        f"{section}={section.title()}({', '.join(entries)})" if section in SECTIONS else f"{section}={entries[0]}"
        for section, entries in new.items()
    ]
    if moved:
        raise UsageError(f"{function} no longer takes {' and '.join(moved)}; write {', '.join(words)}")


def check_sections(**given: Any) -> None:
    """Refuse an argument that is not the class of its name, such as a mapping.

    Raises:
        UsageError: names the argument and the class.
    """
    for name, value in given.items():
        if not isinstance(value, SECTIONS[name]):
            kind = SECTIONS[name].__name__
            raise UsageError(f"{name} is of type {type(value).__name__}; write {name}={kind}(...)")


def _shown(value: Any) -> str:
    """A value as code, or three dots if it has no literal form."""
    text = repr(value)
    return "..." if text.startswith("<") else text
