"""The run directory: its recipe, its rows, what it ran on. Only rank 0 writes. This module never imports torch.

runs/NAME/
  recipe.yaml                 the resolved recipe
  environment.json            versions, hardware, commit
  choices.json                what the method, the model and the tasks resolved to: meta_lr, shared parameters, ...
  metrics.jsonl               one row per log step; no clock in it
  timing.jsonl                the same steps with seconds and steps per second
  checkpoints/STEP/           what `--resume` continues from
  initialization.safetensors  phi, once the run is complete
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, load, to_yaml
from trajshift.runs.resume import check_boundary, resumed_recipe
from trajshift.training.checkpoint_files import MANIFEST, checkpoint_folders
from trajshift.utils.files import parsed_json, read_jsonl, replace_file, safetensors_header, write_json
from trajshift.utils.seals import add_seal, check_seals, renew_seals, seal_file


def run_name(recipe: Recipe, source: str) -> str:
    """The name of the run directory: output.name, or recipe, method and seed."""
    return recipe.output.name or f"{source}-{recipe.method}-seed{recipe.seed}"


OWN_FILES = (
    "recipe.yaml", "environment.json", "choices.json", "metrics.jsonl", "timing.jsonl", "evaluation.jsonl", "data.json",
    "checkpoints", "initialization.safetensors", "tensorboard",
)  # fmt: skip
"""What a run writes into its folder."""


class RunDirectory:
    """Paths, rows and checks of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._metrics: BinaryIO | None = None

    @property
    def exists(self) -> bool:
        """Whether a run left numbers here; one that failed before its first row may be started over."""
        if not (self.path / "recipe.yaml").is_file():
            return False
        metrics = self.path / "metrics.jsonl"
        return bool(checkpoint_folders(self.checkpoints)) or (metrics.is_file() and metrics.stat().st_size > 0)

    def refuse_what_is_not_ours(self) -> None:
        """Refuse a folder with files of the names that a run writes, which no run has written.

        A run writes environment.json before anything else. Without it a folder is a run's only if it has checkpoints.

        Raises:
            UsageError: names the first such file, or a link inside the folder that leads out of it.
        """
        for name in OWN_FILES:
            file = self.path / name
            if file.is_symlink() and (file.is_file() or file.is_dir() or not file.exists()):
                raise UsageError(f"{self.path / name} is a link, and a run does not write through it; remove the link")
        there = [name for name in OWN_FILES if (self.path / name).is_file() or (self.path / name).is_dir()]
        if there and not self._is_ours():
            raise UsageError(
                f"{self.path / there[0]} is there already and was not written by trajshift; choose another --name or "
                "output.directory, or move the file"
            )

    def _is_ours(self) -> bool:
        if any((folder / MANIFEST).is_file() for folder in checkpoint_folders(self.checkpoints).values()):
            return True
        try:
            environment = parsed_json((self.path / "environment.json").read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(environment, dict) and {*environment} >= {"python", "packages"}

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def initialization(self) -> Path:
        """The file of the finished run's phi."""
        return self.path / "initialization.safetensors"

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load(self.path)

    def last_step(self) -> int:
        """Inner steps done by the last row of timing.jsonl, for the progress; 0 where the file is damaged."""
        try:
            rows = self._timing()
        except UsageError:
            return 0
        return int(rows[-1]["step"]) if rows else 0

    def is_complete(self, recipe: Recipe) -> bool:
        """Whether exactly this recipe was trained here to its end.

        Raises:
            UsageError: another recipe was.
        """
        if not self.exists:
            return False
        old = self.recipe()
        new = resumed_recipe(old, recipe, self.path)
        done = self.initialization_step()
        if done is not None:
            check_boundary(old, new, done)
        return done == new.total_steps

    def adopt(self, recipe: Recipe) -> None:
        """Write `recipe` where the complete run has another that trains the same: other targets, or moved data."""
        old = self.recipe()
        new = resumed_recipe(old, recipe, self.path)
        if new != old:
            self.write_recipe(new)

    def initialization_step(self) -> int | None:
        """The inner steps behind initialization.safetensors, from its header; None where there is none."""
        try:
            header = parsed_json(safetensors_header(self.initialization))
            return int(parsed_json(header["__metadata__"]["trajshift"])["step"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def lock(self) -> None:
        """Refuse to train where another process does; held until this process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.path} is being trained by another process; wait or name another run") from None

    def unlock(self) -> None:
        """Let others train here, and close what is open."""
        metrics, self._metrics = self._metrics, None
        held, self._lock = self._lock, None
        try:
            if metrics is not None:
                metrics.close()  # on a full disk it fails once more
        finally:
            if held is not None:
                os.close(held)
            with suppress(OSError):
                self.path.rmdir()  # succeeds only where nothing was written

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe."""
        replace_file(self.path / "recipe.yaml", to_yaml(recipe))

    def write_environment(self, details: dict[str, Any], choices: dict[str, Any]) -> None:
        """Write what this start runs on, after what earlier ones ran on, and the choices that were resolved."""
        path = self.path / "environment.json"
        try:
            now = parsed_json(path.read_bytes())
            earlier = [*now.pop("earlier_starts", []), now]
        except (OSError, ValueError, AttributeError, TypeError):
            earlier = []
        details = {**details, "earlier_starts": earlier} if earlier else details
        write_json(path, details)
        write_json(self.path / "choices.json", choices)

    # rows ---------------------------------------------------------------------------------------------------

    def cut(self, step: int, metrics_bytes: int) -> None:
        """Forget the rows written after the checkpoint at `step`, half-written lines included.

        Raises:
            UsageError: metrics.jsonl is shorter than it was when the checkpoint was made, or a row was changed.
        """
        metrics = self.path / "metrics.jsonl"
        length = metrics.stat().st_size if metrics.exists() else 0
        if length < metrics_bytes:
            raise UsageError(
                f"{metrics} has {length} bytes, but had {metrics_bytes} at the checkpoint of step {step}; "
                "put the file back"
            )
        check_seals(metrics, metrics_bytes)
        if metrics.exists():
            os.truncate(metrics, metrics_bytes)
            if seal_file(metrics).exists():
                renew_seals(metrics)
        timing = self.path / "timing.jsonl"
        kept = [row for row in self._timing() if row["step"] <= step]
        if timing.exists():
            replace_file(timing, "".join(json.dumps(row) + "\n" for row in kept))

    def seconds(self) -> float:
        """Seconds trained so far, by the last row of timing.jsonl."""
        rows = self._timing()
        return float(rows[-1].get("seconds", 0.0)) if rows else 0.0

    def _timing(self) -> list[dict[str, Any]]:
        """The rows of timing.jsonl.

        Raises:
            UsageError: the file is damaged.
        """
        return read_jsonl(self.path / "timing.jsonl", {"step": int})

    def write_row(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl and one to timing.jsonl."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "ab")  # noqa: SIM115 - closed by unlock
        line = (json.dumps(metrics) + "\n").encode()
        add_seal(self.path / "metrics.jsonl", line)
        self._metrics.write(line)
        self._metrics.flush()
        with open(self.path / "timing.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(timing) + "\n")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl once all rows are safely on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0
