"""The sections that only recipes have: plain dataclasses with a docstring under each field, checked when made.

The others are arguments in Python too: `trajshift.settings`.

Nothing here imports torch, pydantic or YAML; `trajshift.recipes.recipe` reads, overrides and writes recipes and puts
the section's name in front of a sentence from here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from trajshift.data.registry import find
from trajshift.errors import UsageError, nearest
from trajshift.settings import FORBID_UNKNOWN, at_least, positive

SOURCE_KINDS = ("npz", "digits", "hf", "cache", "hub")
MAX_NAME = 200
"""Bytes of the longest name of a run or a task: file systems allow 255, and file names add to it."""
NAME = re.compile(r"[A-Za-z0-9_-]+")
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(kw_only=True, slots=True)
class ModelRecipe:
    """The network, built once per task."""

    __pydantic_config__ = FORBID_UNKNOWN

    name: str = "conv"
    """resnet20|32|44|56, resnet18|34, conv, or `package.module:factory` (called as factory(task, **options))."""

    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model, such as width for conv."""


@dataclass(kw_only=True, slots=True)
class DataRecipe:
    """What every task uses unless it says otherwise."""

    __pydantic_config__ = FORBID_UNKNOWN

    root: str = "."
    """Folder that caches and relative files of `npz:` and local `hf:` sources are looked up in; itself relative to the
    recipe's file, in an override and in a built-in recipe to the working directory."""

    size: int | None = None
    """Height and width in pixels to which images are resized once; null keeps each source's own size."""

    channels: int | None = None
    """Channels the model sees, 1 or 3 (grey images are repeated); null keeps each source's own."""

    crop_padding: int = 0
    """Random crop: black pixels added on each side before a crop of the image's size; 0 switches it off."""

    flip: bool = False
    """Random horizontal flip; switch it off for digits, letters and signs."""

    mean: float | list[float] = 0.5
    """Subtracted from pixels in [0, 1]; one number or one per channel."""

    std: float | list[float] = 0.5
    """Divides the centred pixels; one number or one per channel."""

    train_images: int | None = None
    """Use at most this many training images per task, class-balanced; null uses all."""

    def __post_init__(self) -> None:
        check_image_fields(self)


@dataclass(kw_only=True, slots=True)
class TaskRecipe:
    """One data set; a field left null takes the value of `data`."""

    __pydantic_config__ = FORBID_UNKNOWN

    source: str = ""
    """`npz:FILE`, `digits:NAME`, `hf:ID_OR_PATH`, a registered data set (`trajshift data list`) as `cache:NAME` (made
    by `trajshift data prepare`) or `hub:NAME` (decoded when read), or `package.module:function`, called as
    function(name, **options)."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the source, such as label, train, test and revision for `hf:` and `hub:`; for `hub:` also
    from, a local copy of the repository."""

    size: int | None = None
    """As data.size."""

    channels: int | None = None
    """As data.channels."""

    crop_padding: int | None = None
    """As data.crop_padding."""

    flip: bool | None = None
    """As data.flip, but false for registered data sets whose images must not be mirrored (svhn)."""

    mean: float | list[float] | None = None
    """As data.mean."""

    std: float | list[float] | None = None
    """As data.std."""

    train_images: int | None = None
    """As data.train_images."""

    weight: float = 1.0
    """Weight of the task in the mean of the meta-gradients."""

    batch_size: int | None = None
    """Images per inner step of this task; null takes the recipe's batch_size."""

    def __post_init__(self) -> None:
        check_image_fields(self)
        positive("weight", self.weight)
        at_least("batch_size", self.batch_size, 1, "image")
        kind, colon, rest = self.source.partition(":")
        if not self.source:
            raise UsageError("a task has no source; give it one, such as source: npz:FILE")
        if not colon or not rest:
            raise UsageError(
                f"source {self.source!r} has no kind; write npz:FILE, digits:NAME, cache:NAME, hub:NAME, hf:ID_OR_PATH"
                " or module:function"
            )
        if kind not in SOURCE_KINDS and not IMPORT_PATH.fullmatch(self.source):
            raise UsageError(f"source {self.source!r} is of unknown kind{nearest(kind, SOURCE_KINDS)}")
        if kind in ("cache", "hub"):
            find(rest)


@dataclass(kw_only=True, slots=True)
class OutputRecipe:
    """What is written, where and how often; none of it changes the numbers."""

    __pydantic_config__ = FORBID_UNKNOWN

    directory: str = "runs"
    """Folder of the run directories."""

    name: str | None = None
    """Name of the run directory; null makes one from recipe, method and seed."""

    log_every: int = 50
    """Inner steps between rows of metrics.jsonl."""

    checkpoint_every: int | None = 500
    """Inner steps between checkpoints; null writes one at the end and on SIGTERM or SIGINT only."""

    keep: int | None = 3
    """Checkpoints kept, the newest; null keeps all (for accuracy against inner steps)."""

    error_every: int | None = None
    """Inner steps of a round between measurements of the shift's approximation error, for which one task in turn is run
    again from its start (k steps after k); null measures nothing."""

    tensorboard: bool = True
    """Write TensorBoard events where the tensorboard package is installed."""

    def __post_init__(self) -> None:
        at_least("log_every", self.log_every, 1, "step")
        at_least("checkpoint_every", self.checkpoint_every, 1, "step")
        at_least("keep", self.keep, 1, "checkpoint")
        at_least("error_every", self.error_every, 1, "step")
        if self.name in (".", ".."):
            raise UsageError(f"name is {self.name!r}, which is a folder that exists; choose a name for the run")
        if self.name is not None and len(self.name.encode()) > MAX_NAME:
            raise UsageError(
                f"name is {self.name[:20] + '...'!r}, {len(self.name)} letters long; use at most {MAX_NAME} bytes"
            )
        if self.name is not None and not re.fullmatch(r"[\w.,=+-]+", self.name):
            raise UsageError(
                f"name is {self.name!r}; use letters, digits and any of . , = + - _ (output.directory sets the folder)"
            )


def check_image_fields(fields: DataRecipe | TaskRecipe) -> None:
    """Refuse impossible sizes, channels, paddings and normalisations."""
    at_least("size", fields.size, 1, "pixel")
    at_least("crop_padding", fields.crop_padding, 0, "pixels")
    at_least("train_images", fields.train_images, 1, "image")
    if fields.channels not in (None, 1, 3):
        raise UsageError(f"channels is {fields.channels}; it must be 1 or 3")
    for std in fields.std if isinstance(fields.std, list) else [fields.std]:
        positive("std", std)


def check_task_names(section: str, names: Collection[str]) -> None:
    """Refuse task names that an override could not address or a file name could not contain."""
    for name in names:
        if len(name) > MAX_NAME:
            raise UsageError(
                f"task name {name[:20] + '...'!r} in {section} is {len(name)} letters long; use at most {MAX_NAME}"
            )
        if not NAME.fullmatch(name):
            raise UsageError(f"task name {name!r} in {section} may hold letters, digits, _ and - only")
