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

from trajshift.algorithm.methods import ResolvedMethod, resolve
from trajshift.errors import UsageError, nearest
from trajshift.recipes.sections import (
    IMPORT_PATH,
    DataRecipe,
    ModelRecipe,
    OutputRecipe,
    TaskRecipe,
    check_task_names,
)
from trajshift.recipes.short_names import full_path, put_in_sections, refuse_two_names, short_path
from trajshift.settings import (
    FORBID_UNKNOWN,
    SHORT_NAMES,
    Execution,
    Finetune,
    Inner,
    Meta,
    Optimization,
    at_least,
    one_of,
)
from trajshift.utils.files import shortened

if TYPE_CHECKING:
    from pydantic import ValidationError

FOLDER = Path(__file__).parent
SECTIONS: dict[str, type] = {
    "model": ModelRecipe,
    "inner": Inner,
    "meta": Meta,
    "execution": Execution,
    "data": DataRecipe,
    "finetune": Finetune,
    "output": OutputRecipe,
}
TASK_SECTIONS = ("tasks", "tuning", "targets")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything that decides the numbers of a run, and where they are written."""

    __pydantic_config__ = FORBID_UNKNOWN

    method: str = "trajectory-shifting"
    """A name `trajshift methods` lists."""

    horizon: int = 1000
    """Inner steps between resets of the local learners (K)."""

    rounds: int = 200
    """Resets (M); each task makes horizon * rounds inner steps."""

    seed: int = 0
    """Every random draw follows from it."""

    batch_size: int = 128
    """Images per inner step and task."""

    heldout: float = 0.2
    """Share of each task's training images kept for held-out batches, where the method needs them."""

    tasks_per_round: int | None = None
    """Tasks sampled at each reset; null trains on all."""

    renew: list[str] = field(default_factory=list)
    """What a reset renews besides the shared parameters: heads, optimizer, statistics."""

    head: str | list[str] | None = None
    """Dotted name of the model's head; null takes the model's own."""

    shared: str | list[str] | None = None
    """Patterns of the names of the shared parameters; null shares all outside the head."""

    initialization: str | None = None
    """What phi starts from: a run's initialization.safetensors, published weights in a file (safetensors, or a state
    dict as torchvision's .pth) or on the hub (hub:timm/resnet18.tv_in1k@REVISION); null draws it from the seed."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The network."""

    inner: Inner = field(default_factory=Inner)
    """The optimizer of the local learners."""

    meta: Meta = field(default_factory=Meta)
    """How phi moves: overrides of the method's choices, and phi's optimizer."""

    execution: Execution = field(default_factory=Execution)
    """Where and how the steps run."""

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

    finetune: Finetune = field(default_factory=Finetune)
    """How targets and tuning tasks are fine-tuned."""

    output: OutputRecipe = field(default_factory=OutputRecipe)
    """What is written, where and how often."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_tasks()
        method = self.resolved_method()
        if method.single and len(self.source_tasks()) != 1:
            raise UsageError(f"method {self.method} trains on one task; choose it with train_on=[NAME]")

    def resolved_method(self) -> ResolvedMethod:
        """The method with the recipe's own choices; an object of the user's stands for one that is known."""
        meta = self.meta
        return resolve(
            self.method,
            horizon=self.horizon,
            meta_every=meta.every,
            carry=None if _is_own(meta.carry) else meta.carry,
            adapt=meta.adapt,
            metagrad="last_gradient" if _is_own(meta.gradient) else meta.gradient,
            batch=meta.batch,
        )

    def _check_numbers(self) -> None:
        at_least("rounds", self.rounds, 1, "round")
        at_least("seed", self.seed, 0)
        at_least("batch_size", self.batch_size, 1, "image")
        at_least("tasks_per_round", self.tasks_per_round, 1, "task")
        if (self.output.error_every or 0) > self.horizon:
            raise UsageError(
                f"output.error_every is {self.output.error_every}, longer than a round of {self.horizon} inner steps "
                "(horizon); use at most that"
            )
        if not 0 < self.heldout < 1:
            raise UsageError(f"heldout is {self.heldout}; it is a share of the training images, between 0 and 1")
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
    """The recipe in a file, in a run directory or built in by name, with `key.path=value` overrides applied.

    A relative `data.root` in a file is looked up beside that file, one in an override in the working directory.

    Raises:
        UsageError: a missing or malformed file, an unknown field, or an impossible value.
    """
    from trajshift.recipes.yaml_text import parse_value, read_yaml

    try:
        where = find(recipe)
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        recipe = shortened(str(recipe), 200)
        raise UsageError(f"{recipe} cannot be read ({reason}); name a recipe file or a run directory") from error
    data = put_in_sections(read_yaml(text, str(where)), where.name)
    given = [(text, *split_override(text)) for text in overrides]
    refuse_two_names((text.partition("=")[0], parse_value(value)) for text, _, value in given)
    for text, path, value in given:
        _override(data, full_path(path), parse_value(value), text)
    loaded = validate(data, where.name)
    on_command_line = any(text.partition("=")[0] in ("data", "data.root") for text, _, _ in given)
    here = Path(recipe).is_dir() or where.resolve().parent in (FOLDER.resolve(), Path.cwd())
    if not on_command_line and not here:
        # Built-in recipes and overrides mean the working directory; a run's recipe has an absolute path.
        loaded.data.root = str(where.parent / Path(loaded.data.root).expanduser())
    return loaded


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


def validate(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked `Recipe` from plain mappings; the first fault is reported in one sentence that starts with `where`."""
    from pydantic import TypeAdapter, ValidationError

    data = _with_names(put_in_sections(data, where))
    try:
        # through JSON, because strict there still builds dataclasses from mappings, and never reads true as 1
        return TypeAdapter(Recipe).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None


_NAMES = (
    "method", "head", "shared", "renew", "train_on", "initialization", "model.name", "data.root", "output.directory",
    "output.name", "execution.device", "meta.gradient", "meta.carry",
)  # fmt: skip
"""Fields that are words or lists of words, in which `1` or `true` is a name."""


def _with_names(data: dict[str, Any]) -> dict[str, Any]:
    """The plain mapping of a recipe with words, as they were written, where only words can be."""
    from trajshift.recipes.yaml_text import as_written

    data = dict(data)
    for name in _NAMES:
        section, _, field = name.rpartition(".")
        owner = data
        if section and isinstance(data.get(section), dict):
            owner = data[section] = dict(data[section])
        elif section:
            continue
        value = owner.get(field)
        if isinstance(value, list):
            owner[field] = ["null" if one is None else as_written(one) for one in value]
        elif value is not None:
            owner[field] = as_written(value)
    return data


def to_yaml(recipe: Recipe) -> str:
    """Every field of the recipe as YAML that `load` reads back to an equal recipe."""
    from trajshift.recipes.yaml_text import dump

    return dump(asdict(recipe))


def to_explained_yaml(recipe: Recipe) -> str:
    """As `to_yaml`, with a comment on what each null of `meta` is resolved to by the method."""
    method = recipe.resolved_method()
    lr = None if method.joint else method.default_meta_lr(recipe.horizon, method.meta_every)
    values = {
        "lr": lr, "every": method.meta_every, "gradient": method.metagrad, "carry": method.carry,
        "adapt": method.adapt, "batch": method.batch,
    }  # fmt: skip
    lines, section = [], ""
    for line in to_yaml(recipe).splitlines():
        name, _, value = line.strip().partition(": ")
        section = section if line.startswith(" ") else name.rstrip(":")
        resolved = values.get(name) if section == "meta" and value == "null" else None
        lines.append(line if resolved is None else f"{line}  # by the method: {resolved}")
    return "\n".join(lines) + "\n"


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
    """`key.path=value` as its path, by the short name of a field that has one, and its unread value."""
    path, equals, value = text.partition("=")
    if not equals or not path or "" in path.split("."):
        raise UsageError(f"override {text!r} is not of the form key.path=value")
    return short_path(path.split(".")), value


def respelled(text: str) -> str:
    """An override by its short name, so that it replaces an earlier one by that name."""
    path, value = split_override(text)
    return f"{'.'.join(path)}={value}"


def _override(data: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    """Put one value, given as the override `text`, into the plain mapping of a recipe."""
    here = data
    for depth, key in enumerate(path[:-1]):
        if depth == 1 and path[0] in TASK_SECTIONS and key not in here and path[-1] != "source":
            raise UsageError(f"unknown task {key!r} in {text!r}{nearest(key, here)}")
        if here.get(key) is None:
            here[key] = _default_options(path[0], here) if key == "options" else {}
        here = here[key]
        if not isinstance(here, dict):
            raise UsageError(f"override {text!r}: {'.'.join(path[: depth + 1])} is a value, not a section")
    if value is None and len(path) == 2 and path[0] in TASK_SECTIONS:
        if path[1] not in here:
            raise UsageError(f"unknown task {path[1]!r} in {text!r}{nearest(path[1], here)}")
        del here[path[1]]
    else:
        here[path[-1]] = value


def _default_options(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an override of one of them is added to, where the section gives none."""
    kind = SECTIONS.get(section, Meta)
    optimizer = fields.get("optimizer", "sgd")
    return kind.default_options(str(optimizer)) if issubclass(kind, Optimization) else {}


def _is_own(choice: str | None) -> bool:
    """Whether a choice is the user's own object, named as `package.module:factory`."""
    return IMPORT_PATH.fullmatch(choice or "") is not None


def _sentence(error: ValidationError) -> str:
    """The first fault pydantic found, in our words."""
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "unexpected_keyword_argument":
        owner = _class_at(path[:-1])
        known = [entry.name for entry in fields(owner)] + ([] if path[:-1] else list(SHORT_NAMES))
        section = f" in {'.'.join(path[:-1])}" if path[:-1] else ""
        return f"unknown field {shortened(path[-1])!r}{section}{nearest(shortened(path[-1]), known)}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        section = ".".join(path)
        return message if message.startswith(f"{section}.") or not path else f"{section}: {message}"
    for depth, part in enumerate(path):
        if part in ("float", "str") or part.startswith("list["):
            path = path[:depth]  # the rest names the branch of a union that was tried, not a field
            break
    wish = fault["msg"].removeprefix("Input ").replace("an object", "a mapping of fields")
    return f"{shortened('.'.join(path))} is {shortened(repr(fault['input']), 200)}; it {wish}"


def _class_at(path: list[str]) -> type:
    """The dataclass whose fields are at a dotted path."""
    if not path:
        return Recipe
    return TaskRecipe if path[0] in TASK_SECTIONS else SECTIONS[path[0]]
