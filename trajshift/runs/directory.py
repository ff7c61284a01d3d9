"""The run directory: recipe, rows of numbers, environment. Only rank 0 writes. This module never imports torch.

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

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from trajshift.errors import UsageError
from trajshift.recipes.recipe import TASK_SECTIONS, Recipe, differences, flatten, load, to_yaml

MAY_CHANGE = ("rounds", "output", "data.root")
"""Fields that a resumed run may change at any step: they do not alter a number that was already computed."""
MAY_CHANGE_BETWEEN_ROUNDS = ("tasks", "train_on")
NOT_TRAINED = ("tuning", "targets")


def run_name(recipe: Recipe, source: str) -> str:
    """The name of the run directory: output.name, or recipe, method and seed."""
    return recipe.output.name or f"{source}-{recipe.method}-seed{recipe.seed}"


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def fingerprint(recipe: Recipe) -> str:
    """A hash of the fields that must not change on resume, to know a checkpoint of another recipe."""
    free = (*MAY_CHANGE, *MAY_CHANGE_BETWEEN_ROUNDS, *NOT_TRAINED, "threads")
    fixed = {key: value for key, value in flatten(recipe).items() if not _within(key, free)}
    return blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=8).hexdigest()


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
        return self.checkpoints.is_dir() or (metrics.exists() and metrics.stat().st_size > 0)

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
        """Whether this very recipe was trained here to its end.

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
        """Write `recipe` where the complete run has another that trains alike: other targets, or data elsewhere."""
        old = self.recipe()
        new = resumed_recipe(old, recipe, self.path)
        if new != old:
            self.write_recipe(new)

    def initialization_step(self) -> int | None:
        """The inner steps behind initialization.safetensors, from its header; None where there is none."""
        try:
            with open(self.initialization, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return int(json.loads(header["__metadata__"]["trajshift"])["step"])
        except (OSError, ValueError, KeyError):
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
            now = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*now.pop("earlier_starts", []), now]
        except (OSError, ValueError):
            earlier = []
        details = {**details, "earlier_starts": earlier} if earlier else details
        replace_file(path, json.dumps(details, indent=1) + "\n")
        replace_file(self.path / "choices.json", json.dumps(choices, indent=1) + "\n")

    # rows ---------------------------------------------------------------------------------------------------

    def cut(self, step: int, metrics_bytes: int) -> None:
        """Forget the rows written after the checkpoint at `step`, half-written lines included.

        Raises:
            UsageError: metrics.jsonl is shorter than it was when the checkpoint was made.
        """
        metrics = self.path / "metrics.jsonl"
        length = metrics.stat().st_size if metrics.exists() else 0
        if length < metrics_bytes:
            raise UsageError(
                f"{metrics} has {length} bytes, but had {metrics_bytes} at the checkpoint of step {step}; "
                "put the file back"
            )
        if metrics.exists():
            os.truncate(metrics, metrics_bytes)
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
        self._metrics.write((json.dumps(metrics) + "\n").encode())
        self._metrics.flush()
        with open(self.path / "timing.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(timing) + "\n")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl once all rows are safely on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a .jsonl file; a half-written last line is left out, a missing file has none."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from None
    return rows


def read_jsonl(file: Path, fields: Mapping[str, Any] = MappingProxyType({})) -> list[dict[str, Any]]:
    """The whole rows of a .jsonl file.

    Args:
        file: one mapping in a line.
        fields: what every row must have: field -> type, or a tuple of types.

    Raises:
        UsageError: the file is damaged; says where, and how to go on.
    """
    try:
        rows = read_rows(file)
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); mend or delete the line") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{file} is damaged (line {number} is no mapping); mend or delete the line")
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise UsageError(
                    f"{file} is damaged ({name} in line {number} is {row.get(name)!r}); mend or delete the line"
                )
    return rows


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old or the new one, never half."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# resume -----------------------------------------------------------------------------------------------------


def resumed_recipe(old: Recipe, new: Recipe, where: Path) -> Recipe:
    """The recipe a resumed run goes on with; what `new` leaves open (name, threads) stays as it was.

    Raises:
        UsageError: a field differs that must not, by its name.
    """
    new = with_absolute_paths(replace(new, threads=new.threads or old.threads))
    new.output = replace(new.output, name=new.output.name or old.output.name)
    free = (*MAY_CHANGE, *MAY_CHANGE_BETWEEN_ROUNDS, *NOT_TRAINED)
    refused = [key for key in differences(old, new) if not _within(key, free)]
    if refused:
        before, after = flatten(old), flatten(new)
        key = refused[0]
        others = f" (also {', '.join(refused[1:])})" if refused[1:] else ""
        raise UsageError(
            f"{where} was started with another recipe: {key} was {before.get(key)!r} and is now {after.get(key)!r}"
            f"{others}; only tasks, rounds and output may change on resume; give the new run another name or folder"
        )
    return new


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its files found from any working directory."""
    data = replace(recipe.data, root=str(Path(recipe.data.root).expanduser().resolve()))
    initialization = recipe.initialization
    if initialization is not None and not initialization.startswith("hub:"):
        initialization = str(Path(initialization).expanduser().resolve())
    return replace(recipe, data=data, initialization=initialization)


def check_boundary(old: Recipe, new: Recipe, step: int) -> None:
    """Refuse changed source tasks unless `step` lies between two rounds."""
    changed = [key for key in differences(old, new) if _within(key, MAY_CHANGE_BETWEEN_ROUNDS)]
    if changed and step % new.horizon:
        raise UsageError(
            f"{changed[0]} may change only between rounds, but the newest checkpoint is at step {step} "
            f"and a round has {new.horizon}; go on with the old tasks to the end of the round"
        )
    if changed and step == new.total_steps:
        raise UsageError(f"{changed[0]} was changed, but the run is complete at step {step}; raise rounds too")
    if step > new.total_steps:
        raise UsageError(
            f"rounds is {new.rounds}, which ends at step {new.total_steps}, but step {step} is already done"
        )


# the world outside ------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(path: Path, *, option: str = "output.directory", again: str | None = None) -> Iterator[None]:
    """Say in one sentence that a disk is full or refuses to be written, whichever library found out.

    `option` names what chooses the folder, `again` the command that goes on; by default those of `trajshift train`.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = str(error)
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in text or "os error 28" in text:
            raise UsageError(
                f"no space left on the disk of {path}; free some and continue with: "
                f"{again or f'trajshift train --resume {path}'}"
            ) from error
        refused = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR)
        if code in refused or "os error 13" in text:  # as safetensors says it
            raise UsageError(f"cannot write to {path}: {text}; choose another {option}") from error
        raise


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, without naming the machine or its user."""
    packages = ("trajshift", "torch", "numpy", "safetensors", "pydantic")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from trajshift import __version__

        return __version__ if package == "trajshift" else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """Commit of the checkout that the package lies in, with + where files differ from it; None elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", "runs/directory.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "") if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = [
    "TASK_SECTIONS",
    "RunDirectory",
    "check_boundary",
    "disk_errors",
    "environment",
    "fingerprint",
    "read_jsonl",
    "read_rows",
    "replace_file",
    "resumed_recipe",
    "run_name",
]
