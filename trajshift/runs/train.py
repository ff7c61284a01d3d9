"""The run driver: meta-trains a recipe into its run directory, stops cleanly, resumes bit for bit.

The numbers come from `MetaTrainer`; this module only decides when to log, when to save and when to stop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trajshift.data.loader import workers_alive
from trajshift.distributed import World, set_threads
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.models.kernels.switch import EAGER
from trajshift.recipes.build_trainer import build_trainer, describe_start
from trajshift.recipes.recipe import Recipe
from trajshift.runs.data_record import data_of, refuse_changed_data, start_digest, write_record
from trajshift.runs.directory import RunDirectory
from trajshift.runs.resume import check_boundary, fingerprint, resumed_recipe, with_absolute_paths, with_threads
from trajshift.runs.signals import Signals
from trajshift.training import checkpoint
from trajshift.training.checkpoint_files import manifest_of
from trajshift.training.trainer import Event
from trajshift.utils.environment import environment
from trajshift.utils.files import disk_errors, parsed_json
from trajshift.utils.progress import Progress
from trajshift.utils.streams import say

POLL_EVERY = 5
"""Inner steps between the ranks' agreements on whether any of them received a signal."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    path: Path
    step: int
    """Inner steps done."""
    complete: bool
    signal: int | None
    """The signal that stopped it; None if none did."""


def train(recipe: Recipe, path: str | Path, *, resume: bool = False, quiet: bool = False) -> Outcome:
    """Meta-train a recipe in the run directory `path`, or resume what is there.

    On SIGTERM or SIGINT all ranks agree on a step, save a checkpoint and return; a second SIGINT interrupts at once.
    Before the first inner step, where there is nothing to save, a signal ends the process.

    Raises:
        UsageError: the directory contains a run and `resume` is False, the recipe differs where it must not, a loss is
            not finite (the last good checkpoint is kept), or the disk is full.
    """
    world = World.current(str(recipe.execution.device))
    directory = RunDirectory(path)
    advice = f"lower workers or free some memory, and continue with: trajshift train --resume {path}"
    with Signals() as signals, disk_errors(directory.path), workers_alive(advice):
        try:
            return _Run(recipe, directory, world, signals, resume=resume, quiet=quiet).go()
        finally:
            directory.unlock()


def kernels_of(path: Path) -> str:
    """The kernels, `fused` or `eager`, that a run began with; one of a version without fused kernels keeps to eager."""
    try:
        return str(parsed_json((path / "choices.json").read_bytes()).get("kernels", EAGER))
    except (OSError, ValueError, AttributeError):
        return EAGER


class _Run:
    """One process's part in one call of `train`."""

    def __init__(
        self, recipe: Recipe, directory: RunDirectory, world: World, signals: Signals, *, resume: bool, quiet: bool
    ) -> None:
        self.directory = directory
        self.signals = signals
        self.world = world
        self.first = world.rank == 0
        self.quiet = quiet
        recipe = with_absolute_paths(recipe)
        self.old = directory.recipe() if directory.exists else None
        if self.old is not None:
            if not resume:
                raise UsageError(
                    f"{directory.path} already contains a run; continue it with --resume or choose another --name"
                )
            recipe = resumed_recipe(self.old, recipe, directory.path)
        world.barrier()  # every rank has looked before the first one writes
        self._lock()
        self.recipe = with_threads(recipe, set_threads(world, recipe.execution.threads))
        self.trainer = build_trainer(self._with_a_start_that_is_there())
        if self.old is not None:
            self.trainer.kernels = kernels_of(directory.path)
        self.fingerprint = fingerprint(self.recipe)
        self.seconds = 0.0
        self.board: Any = None

    def go(self) -> Outcome:
        """Start or resume, train, and finish."""
        self._check_data()
        self._resume()
        if self.first:
            self.directory.write_environment(self._environment(), self.trainer.describe())
            self.directory.write_recipe(self.recipe)
            write_record(self.directory.path, self.data, start_digest(self.recipe.initialization))
            self.seconds = self.directory.seconds()
            self.board = self._tensorboard()
        title = f"{self.directory.path.name} ({self.trainer.method.name})"
        show = self.first and not self.quiet
        with Progress(title, self.trainer.total_steps, start=self.trainer.step, enabled=show) as progress:
            self._announce(progress)
            self.signals.defer()
            stopped = self._loop(self.signals, progress)
        if self.board is not None:
            self.board.close()
        complete = self.trainer.step >= self.trainer.total_steps
        if complete and self.first:
            self.trainer.initialization.save(self.directory.initialization)
        self.world.barrier()
        return Outcome(self.directory.path, self.trainer.step, complete, stopped)

    # starting -----------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        """Lock the directory; if that fails, all ranks report it instead of waiting for each other."""
        failure: Exception | None = None
        if self.first:
            try:
                self.directory.lock()
                self.directory.refuse_what_is_not_ours()
            except (OSError, UsageError) as error:
                failure = error
        if self.world.any(failure is not None):
            raise failure or UsageError(f"{self.directory.path} could not be locked by rank 0")

    def _with_a_start_that_is_there(self) -> Recipe:
        """The recipe, without its initialization where that is gone but a checkpoint has phi."""
        start = self.recipe.initialization
        if start is None or self.old is None or start.startswith("hub:") or Path(start).is_file():
            return self.recipe
        if checkpoint.latest_valid(self.directory.checkpoints)[0] is None:
            return self.recipe
        if self.first:
            say(f"note: {start} is not there any more; phi is taken from the checkpoint")
        return replace(self.recipe, initialization=None)

    def _check_data(self) -> None:
        """Refuse to resume on data that has changed; all ranks report it."""
        self.data: dict[str, str | None] = {}
        failure = ""
        if self.first:
            self.data = data_of(self.recipe, self.trainer.meta_step.active.tasks)
            if self.old is not None:
                try:
                    for warning in refuse_changed_data(self.directory.path, self.old, self.recipe, self.data):
                        say(warning)
                except UsageError as error:
                    failure = str(error)
        if failure := self.world.gather(failure)[0]:
            raise UsageError(failure)

    def _resume(self) -> None:
        """Load the newest valid checkpoint, if there is one, and cut what was written after it."""
        found = checkpoint.latest_valid(self.directory.checkpoints) if self.old is not None else None
        metrics_bytes = 0
        if found is not None:
            newest, notes = found
            for note in notes if self.first else ():
                say(note)
            if newest is not None:
                extra = manifest_of(newest)["extra"]  # its checksums were just compared
                assert self.old is not None
                paths = (self.recipe.initialization, self.old.initialization)  # as version 0.1 did
                if extra["recipe"] not in (self.fingerprint, *(fingerprint(self.recipe, path) for path in paths)):
                    raise UsageError(f"{newest} was written by another recipe; remove it or start a new run")
                check_boundary(self.old, self.recipe, int(newest.name))
                checkpoint.load(newest, self.trainer.meta_step)
                metrics_bytes = extra["metrics_bytes"]
        if self.first and self.old is not None:
            self.directory.cut(self.trainer.step, metrics_bytes)
        self.world.barrier()

    def _environment(self) -> dict[str, Any]:
        details = environment()
        if self.trainer.device.type == "cuda":
            details["device"] = torch.cuda.get_device_name(self.trainer.device)
        return {
            **details,
            "from_step": self.trainer.step,
            "processes": self.world.size,
            "threads": self.recipe.execution.threads,
        }

    def _tensorboard(self) -> Any:
        """A TensorBoard writer, or None where it is switched off or not installed."""
        if not self.recipe.output.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.directory.path / "tensorboard"), purge_step=self.trainer.step + 1)

    def _announce(self, progress: Progress) -> None:
        choices = self.trainer.describe()
        where = f"from step {self.trainer.step}" if self.trainer.step else f"in {self.directory.path}"
        text = ", ".join(f"{key} {_short(value)}" for key, value in choices.items() if _is_plain(value))
        progress.note(f"{self.directory.path.name} {where}: {text}")
        if self.trainer.step == 0 and (start := describe_start(self.recipe, self.trainer)):
            progress.note(start)
        if own := self.trainer.meta_step.active.blueprint.unshared:
            progress.note(f"not shared, because not every task has them with one shape: {', '.join(own)}")

    # training -----------------------------------------------------------------------------------------------

    def _loop(self, signals: Signals, progress: Progress) -> int | None:
        """Train to the end or to a signal; returns the signal."""
        output = self.recipe.output
        saved = self.trainer.step if self.trainer.step else -1
        began, before = time.monotonic(), self.seconds
        total = self.trainer.total_steps
        for event in self.trainer:
            step = event.step
            last = step == total
            stop = self._told_to_stop(signals, step)
            log = step % output.log_every == 0 or last
            save = last or stop or (output.checkpoint_every is not None and step % output.checkpoint_every == 0)
            if log or save:
                self._check_finite(saved)
            if log:
                self.seconds = before + time.monotonic() - began
                progress.update(step, self._log(event))
            else:
                progress.update(step)
            if save:
                self._save()
                saved = step
            if stop and not last:
                received = [number for number in self.world.gather(signals.received) if number]
                progress.note(f"stopped at step {step} with a checkpoint; continue with: {self._resume_command()}")
                return received[0]
        return None

    def _told_to_stop(self, signals: Signals, step: int) -> bool:
        """Whether any rank has a signal, asked by all ranks at the same steps."""
        if self.world.size > 1 and step % POLL_EVERY:
            return False
        return self.world.any(signals.received is not None)

    def _check_finite(self, saved: int) -> None:
        try:
            self.trainer.check_finite()
        except NonFiniteLoss as error:
            kept = f"the last good checkpoint, step {saved}, is kept" if saved >= 0 else "no checkpoint was made yet"
            raise NonFiniteLoss(f"{error}; {kept} in {self.directory.path}") from None

    def _log(self, event: Event) -> dict[str, float] | None:
        """One row in every log; collective. Returns the tasks' losses on the first rank."""
        row = self.trainer.metrics()
        if not self.first:
            return None
        rate = event.step / self.seconds if self.seconds > 0 else 0.0
        timing = {"step": event.step, "seconds": round(self.seconds, 3), "steps_per_second": round(rate, 4)}
        self.directory.write_row(row, timing)
        if self.board is not None:
            self._write_board(row)
        return {name: values["loss"] for name, values in row["tasks"].items()}

    def _write_board(self, row: dict[str, Any]) -> None:
        for name, values in row["tasks"].items():
            for quantity, value in values.items():
                self.board.add_scalar(f"{quantity}/{name}", value, row["step"])
        for reading in row.get("approximation_errors", ()):
            relative = reading["error"] / reading["distance"] if reading["distance"] else 0.0
            self.board.add_scalar(f"relative approximation error/{reading['task']}", relative, reading["step"])
        for quantity in ("meta_update_norm", "inner_steps", "gradient_evaluations"):
            self.board.add_scalar(quantity, row[quantity], row["step"])

    def _save(self) -> None:
        """Save a checkpoint; collective."""
        rows = self.directory.metrics_bytes() if self.first else 0
        extra = {"recipe": self.fingerprint, "metrics_bytes": rows}
        checkpoint.save(self.directory.checkpoints, self.trainer.meta_step, extra)
        if self.first:
            checkpoint.prune(self.directory.checkpoints, self.recipe.output.keep, self.trainer.step)

    def _resume_command(self) -> str:
        return f"trajshift train --resume {self.directory.path}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
