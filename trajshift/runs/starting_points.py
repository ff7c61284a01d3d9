"""Where fine-tuning starts, as files: the initialization of a run, its checkpoints, weights from elsewhere.

Only loading phi needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from trajshift.errors import UsageError
from trajshift.evaluation.evaluation_row import FINAL, INITIAL_WEIGHTS, SCRATCH, StartingPoint
from trajshift.recipes.recipe import Recipe
from trajshift.runs.directory import RunDirectory
from trajshift.training.checkpoint_files import SHARED, checkpoint_folders, manifest_of
from trajshift.utils.files import read_jsonl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SavedStart:
    """A starting point and where its phi is."""

    point: StartingPoint
    source: Path | None
    """An initialization file or a checkpoint folder; None from scratch."""

    def digest(self) -> str | None:
        """Identifies the phi; None from scratch."""
        if self.source is None:
            return None
        if self.source.is_dir():
            return str(manifest_of(self.source)["files"][SHARED])[:12]
        return sha256(self.source.read_bytes()).hexdigest()[:12]

    def inner_steps(self, run: Path, recipe: Recipe) -> int:
        """Cumulative inner steps per task behind it, replays counted."""
        if self.source is None or not self.point.is_meta_trained:
            return 0
        if self.source.is_dir():
            return int(manifest_of(self.source)["numbers"]["inner_steps"])
        rows = read_jsonl(run / "metrics.jsonl")
        return int(rows[-1]["inner_steps"]) if rows else recipe.total_steps


def starts_of(run: Path, recipe: Recipe, *, checkpoints: bool, scratch: bool) -> list[SavedStart]:
    """What is fine-tuned of a run: without meta-training (`scratch`), its end, and every checkpoint (`checkpoints`).

    Raises:
        UsageError: the run is not finished, and `checkpoints` are not asked for.
    """
    starts = [_untrained(recipe)] if scratch else []
    final = RunDirectory(run).initialization
    if final.is_file():
        starts.append(SavedStart(FINAL, final))
    elif not checkpoints:
        raise UsageError(
            f"{run} is not finished: it has no {final.name}; continue it with --resume or evaluate its checkpoints"
        )
    return starts + (list(_checkpoints(run)) if checkpoints else [])


def _untrained(recipe: Recipe) -> SavedStart:
    """Where fine-tuning starts without meta-training."""
    if recipe.initialization is None:
        return SavedStart(SCRATCH, None)
    from trajshift.learners.pretrained import locate

    source = locate(recipe.initialization)
    if not source.is_file():
        raise UsageError(f"there is no initialization at {source}; say where it is with initialization=FILE")
    return SavedStart(INITIAL_WEIGHTS, source)


def _checkpoints(run: Path) -> Iterator[SavedStart]:
    for step, folder in checkpoint_folders(RunDirectory(run).checkpoints).items():
        yield SavedStart(StartingPoint.at_step(step), folder)


def current_digests(run: Path, wanted: Collection[StartingPoint]) -> dict[StartingPoint, str | None]:
    """Digests of those of the run's own starting points that are still there."""
    final = RunDirectory(run).initialization
    there = [*_checkpoints(run), *([SavedStart(FINAL, final)] if final.is_file() else [])]
    return {start.point: start.digest() for start in there if start.point in wanted}


def load_phi(source: Path) -> Mapping[str, Tensor]:
    """phi from an initialization file or a checkpoint folder, after comparing every checksum."""
    from trajshift.learners.pretrained import load_start
    from trajshift.training.checkpoint import verify

    if source.is_file():
        return load_start(source)
    verify(source)
    return phi_of(source)


def phi_of(checkpoint: Path) -> Mapping[str, Tensor]:
    """phi from a checkpoint folder; nothing else is read and no checksum is compared."""
    from trajshift.learners.initialization import Initialization, load_initialization

    shared = load_initialization(checkpoint / SHARED)
    prefix = "phi/"
    return Initialization({n.removeprefix(prefix): t for n, t in shared.items() if n.startswith(prefix)})
