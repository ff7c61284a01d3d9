"""Recipes: one typed description of a run, read from YAML, overridden by `key.path=value`, checked without torch.

recipe = load("digits", ["method=reptile", "tasks.mnist=null"])
print(to_yaml(recipe))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.algorithm.methods import resolve
from trajshift.errors import UsageError, nearest
from trajshift.recipes.sections import (
    FORBID_UNKNOWN,
    IMPORT_PATH,
    DataRecipe,
    FinetuneRecipe,
    InnerRecipe,
    MetaRecipe,
    ModelRecipe,
    OutputRecipe,
    TaskRecipe,
    at_least,
    check_task_names,
    one_of,
    positive,
)
from trajshift.settings import ENGINES, SGD_OPTIONS

if TYPE_CHECKING:
    from pydantic import ValidationError

FOLDER = Path(__file__).parent
SECTIONS: dict[str, type] = {
    "model": ModelRecipe,
    "inner": InnerRecipe,
    "meta": MetaRecipe,
    "data": DataRecipe,
    "finetune": FinetuneRecipe,
    "output": OutputRecipe,
}
TASK_SECTIONS = ("tasks", "tuning", "targets")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything that decides the numbers of a run, and where they are written.

    The four choices (metagrad, carry, adapt, batch, with meta_every) left null are those of the method.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    method: str = "trajectory-shifting"
    """A name `trajshift methods` lists."""

    horizon: int = 1000
    """Inner steps between resets of the local learners (K)."""

    rounds: int = 200
    """Resets (M); each task makes horizon * rounds inner steps."""

    meta_lr: float | None = None
    """Meta-learning rate (beta); null takes the method's, printed at the start."""

    meta_every: int | None = None
    """Inner steps between meta-updates, a divisor of horizon."""

    metagrad: str | None = None
    """Meta-gradient: displacement, last_gradient, path_length or implicit."""

    metagrad_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the meta-gradient, such as iMAML's strength."""

    carry: str | None = None
    """What the running theta does once phi has moved: shift, hold, random, replay, or `package.module:carry`, which
    is called without arguments and returns a `trajshift.algorithm.carries.Carry`."""

    adapt: str | None = None
    """Which parameters the inner step moves: all or head."""

    batch: str | None = None
    """Where a gradient at theta is taken: train (the last inner one) or heldout batches."""

    seed: int = 0
    """Every random draw follows from it."""

    batch_size: int = 128
    """Images per inner step and task."""

    heldout: float = 0.2
    """Share of each task's training images kept for held-out batches, where the method needs them."""

    tasks_per_round: int | None = None
    """Tasks sampled anew at each reset; null trains on all."""

    renew: list[str] = field(default_factory=list)
    """What a reset renews beside the shared parameters: heads, optimizer, statistics."""

    head: str | list[str] | None = None
    """Dotted name of the model's head; null takes the model's own."""

    shared: str | list[str] | None = None
    """Patterns of the names of the shared parameters; null shares all outside the head."""

    grad_clip: float | None = None
    """Largest gradient norm of a task; null does not clip."""

    autocast: str | None = None
    """bfloat16 or float16 for the forward passes; null keeps float32."""

    device: str = "cpu"
    """A torch device, such as cpu or cuda."""

    workers: int = 0
    """Processes that load sources too large for memory; 0 loads in the training process."""

    threads: int | None = None
    """CPU threads of each process; null shares the cores among the processes. Two counts can differ in bits."""

    engine: str = "auto"
    """How the steps are run: loop (one task after another), parallel (side by side on the CPU's threads), graph (CUDA
    graphs) or auto, the fastest of them that can."""

    channels_last: bool | None = None
    """Keep convolutions channels-last; null does where that is faster."""

    overlap: bool = False
    """Let the ranks sum a meta-gradient while the next inner step runs; phi and theta then move one inner step late."""

    initialization: str | None = None
    """What phi starts from: a run's initialization.safetensors, published weights in a file (safetensors, or a state
    dict as torchvision's .pth) or on the hub (hub:timm/resnet18.tv_in1k@REVISION); null draws it from the seed."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The network."""

    inner: InnerRecipe = field(default_factory=InnerRecipe)
    """The optimizer of the local learners."""

    meta: MetaRecipe = field(default_factory=MetaRecipe)
    """The optimizer of phi."""

    data: DataRecipe = field(default_factory=DataRecipe)
    """What every task uses unless it says otherwise."""

    tasks: dict[str, TaskRecipe] = field(default_factory=dict)
    """Source tasks by name; `tasks.NAME=null` drops one."""

    train_on: list[str] | None = None
    """Names of the tasks to meta-train on; null is all of them."""

    tuning: dict[str, TaskRecipe] = field(default_factory=dict)
    """Tasks that `trajshift sweep` chooses by; neither sources nor targets."""

    targets: dict[str, TaskRecipe] = field(default_factory=dict)
    """Meta-test tasks, fine-tuned from phi."""

    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """How targets and tuning tasks are fine-tuned."""

    output: OutputRecipe = field(default_factory=OutputRecipe)
    """What is written, where and how often."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_tasks()
        method = resolve(
            self.method,
            horizon=self.horizon,
            meta_every=self.meta_every,
            carry=None if IMPORT_PATH.fullmatch(self.carry or "") else self.carry,
            adapt=self.adapt,
            metagrad=self.metagrad,
            batch=self.batch,
        )
        if method.single and len(self.source_tasks()) != 1:
            raise UsageError(f"method {self.method} trains on one task; choose it with train_on=[NAME]")

    def _check_numbers(self) -> None:
        at_least("rounds", self.rounds, 1, "round")
        at_least("seed", self.seed, 0)
        at_least("batch_size", self.batch_size, 1, "image")
        at_least("tasks_per_round", self.tasks_per_round, 1, "task")
        at_least("workers", self.workers, 0)
        at_least("threads", self.threads, 1, "thread")
        one_of("engine", self.engine, ENGINES)
        positive("meta_lr", self.meta_lr)
        if (self.output.error_every or 0) > self.horizon:
            raise UsageError(
                f"output.error_every is {self.output.error_every}, longer than a round of {self.horizon} inner steps "
                "(horizon); use at most that"
            )
        positive("grad_clip", self.grad_clip)
        if not 0 < self.heldout < 1:
            raise UsageError(f"heldout is {self.heldout}; it is a share of the training images, between 0 and 1")
        one_of("autocast", self.autocast, ("bfloat16", "float16"))
        for part in self.renew:
            one_of("an entry of renew", part, ("heads", "optimizer", "statistics"))

    def _check_tasks(self) -> None:
        for section in ("tasks", "tuning", "targets"):
            check_task_names(section, getattr(self, section))
        if not self.tasks:
            raise UsageError("the recipe has no tasks to meta-train on; add one under tasks:")
        for name in self.train_on or ():
            one_of("a task in train_on", name, self.tasks)
        if self.train_on is not None and not self.train_on:
            raise UsageError("train_on is empty; name at least one task, or null for all")
        overlap = sorted(set(self.targets) & (set(self.tuning) | set(self.source_tasks())))
        if overlap:
            raise UsageError(
                f"target {overlap[0]!r} is also trained or tuned on, so its accuracy would say nothing; drop one"
            )

    def source_tasks(self) -> dict[str, TaskRecipe]:
        """The tasks meta-trained on, by name, in the recipe's order."""
        if self.train_on is None:
            return dict(self.tasks)
        return {name: task for name, task in self.tasks.items() if name in self.train_on}

    @property
    def total_steps(self) -> int:
        """Inner steps of each task, replays not counted."""
        return self.horizon * self.rounds


def builtin_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, in a run directory or built in by name, with `key.path=value` overrides put in.

    Raises:
        UsageError: a missing or malformed file, an unknown field, or a value that cannot be.
    """
    from trajshift.recipes.yaml_text import read_yaml

    try:
        where = find(recipe)
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UsageError(f"{recipe} cannot be read ({reason}); name a recipe file or a run directory") from error
    data = read_yaml(text, str(where))
    for override in overrides:
        _override(data, override)
    return validate(data, where.name)


def find(recipe: str | Path) -> Path:
    """The file behind a path, a run directory or a built-in name."""
    path = Path(recipe)
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UsageError(f"{path} is a folder without recipe.yaml; name a recipe file or a run directory")
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if (FOLDER / f"{recipe}.yaml").is_file():
        return FOLDER / f"{recipe}.yaml"
    known = builtin_names()
    raise UsageError(f"no recipe {str(recipe)!r}: neither a file nor built in{nearest(str(recipe), known)}")


def validate(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A checked `Recipe` from plain mappings; the first fault is said in one sentence that starts with `where`."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # through JSON, because strict there still builds dataclasses from mappings, and never reads true as 1
        return TypeAdapter(Recipe).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None


def to_yaml(recipe: Recipe) -> str:
    """Every field of the recipe as YAML that `load` reads back to an equal recipe."""
    from trajshift.recipes.yaml_text import dump

    return dump(asdict(recipe))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every field by its dotted path, free-form options and lists whole."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and not prefix.endswith("options") and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", asdict(recipe))
    return flat


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Dotted paths of the fields in which two recipes differ."""
    before, after = flatten(old), flatten(new)
    missing = object()
    return [key for key in {**before, **after} if before.get(key, missing) != after.get(key, missing)]


def split_override(text: str) -> tuple[list[str], str]:
    """`key.path=value` as its path and its unread value."""
    path, equals, value = text.partition("=")
    if not equals or not path or "" in path.split("."):
        raise UsageError(f"override {text!r} is not of the form key.path=value")
    return path.split("."), value


def _override(data: dict[str, Any], text: str) -> None:
    """Put one `key.path=value` into the plain mapping of a recipe."""
    from trajshift.recipes.yaml_text import parse_value

    path, value = split_override(text)
    here = data
    for depth, key in enumerate(path[:-1]):
        if depth == 1 and path[0] in TASK_SECTIONS and key not in here and path[-1] != "source":
            raise UsageError(f"unknown task {key!r} in {text!r}{nearest(key, here)}")
        if here.get(key) is None:
            is_sgd = key == "options" and str(here.get("optimizer", "sgd")).lower() == "sgd"
            here[key] = dict(SGD_OPTIONS.get(path[0], {})) if is_sgd else {}
        here = here[key]
        if not isinstance(here, dict):
            raise UsageError(f"override {text!r}: {'.'.join(path[: depth + 1])} is a value, not a section")
    parsed = parse_value(value)
    if parsed is None and len(path) == 2 and path[0] in TASK_SECTIONS:
        if path[1] not in here:
            raise UsageError(f"unknown task {path[1]!r} in {text!r}{nearest(path[1], here)}")
        del here[path[1]]
    else:
        here[path[-1]] = parsed


def _sentence(error: ValidationError) -> str:
    """The first fault pydantic found, in our words."""
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "unexpected_keyword_argument":
        owner = _class_at(path[:-1])
        known = [entry.name for entry in fields(owner)]
        section = f" in {'.'.join(path[:-1])}" if path[:-1] else ""
        return f"unknown field {path[-1]!r}{section}{nearest(path[-1], known)}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{'.'.join(path)}: {message}" if path else message
    for depth, part in enumerate(path):
        if part in ("float", "str") or part.startswith("list["):
            path = path[:depth]  # from here on: the branch of a union that was tried, no field
            break
    wish = fault["msg"].removeprefix("Input ").replace("an object", "a mapping of fields")
    return f"{'.'.join(path)} is {fault['input']!r}; it {wish}"


def _class_at(path: list[str]) -> type:
    """The dataclass whose fields stand at a dotted path."""
    if not path:
        return Recipe
    return TaskRecipe if path[0] in TASK_SECTIONS else SECTIONS[path[0]]
