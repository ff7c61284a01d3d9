"""Checkpoints: atomic, checksummed, readable at any world size, safetensors and JSON only.

A checkpoint is a directory named after its step: `shared.safetensors` (phi, the meta-optimizer, counters), one
file per task (its row, head, statistics, optimizer state), and `manifest.json` with a SHA-256 for each file and for
itself. It is written under a temporary name, the manifest last, and renamed into place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from trajshift.errors import UsageError, first_line
from trajshift.learners.learner import OWN
from trajshift.training.approximation_error import joined
from trajshift.training.checkpoint_files import MANIFEST, SHARED, checkpoint_folders, manifest_of
from trajshift.training.meta_step import MetaStep
from trajshift.utils.files import write_to_disk


def _write(path: Path, content: bytes) -> str:
    """Writes a file and waits until it is on the disk; returns its SHA-256."""
    write_to_disk(path, content)
    return sha256(content).hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return serialize({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def _file_name(index: int, task: str) -> str:
    return f"task-{index:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', task)[:60]}.safetensors"


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# -- what is saved -------------------------------------------------------------------------------------------


def _shared_state(run: MetaStep) -> tuple[dict[str, Tensor], dict[str, Any]]:
    outer, numbers = run.meta_optimizer.state()
    tensors = {f"phi/{name}": view for name, view in run.layout.views(run.phi).items()}
    tensors |= {f"outer/{name}": tensor for name, tensor in outer.items()}
    constants = run.active.blueprint.constants
    tensors |= {f"constant/{name}": tensor for name, tensor in constants.values.items()}
    tensors["update_norm"] = run.counters.update_norm
    if run.pending is not None:
        tensors |= {f"pending/{name}": view for name, view in run.layout.views(run.pending()).items()}
    readings = run.observer.rows() if run.observer is not None else []
    gathered = run.world.gather((dict(run.counters.counts), list(run.active.names), readings))
    return tensors, {
        "step": run.step,
        "inner_steps": run.counters.inner_steps,
        "counts": dict(sorted(sum((Counter(counts) for counts, _, _ in gathered), Counter()).items())),
        "seated": sorted(name for _, names, _ in gathered for name in names),
        "readings": joined(rows for _, _, rows in gathered),
        "outer": numbers,
        **({"from_phi": sorted(constants.from_phi)} if constants.values else {}),
    }


def _task_state(run: MetaStep, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    active = run.active
    if name not in active.names:
        return dict(active.waiting.get(name, {})), {}
    row = active.names.index(name)
    tensors, numbers = active.learners[row].state()
    everything: dict[str, Any] = {"optimizer": numbers, "loss_count": run.counters.loss_count[row]}
    tensors = tensors | {
        "tally/loss_sum": run.counters.loss_sum[row],
        "tally/first_bad_step": run.counters.first_bad_step[row],
    }
    if run.k:
        views = run.layout.views(run.theta[row])
        tensors |= {f"theta/{label}": view for label, view in views.items()}
        tensors |= {f"metagrad/{label}": state[row] for label, state in run.meta_gradient.state().items()}
        tensors |= {f"carry/{label}": state[row] for label, state in run.carry.state().items()}
    if run.k and name in active.snapshots:
        kept, kept_numbers = active.snapshots[name]
        tensors |= {f"snapshot/{label}": tensor for label, tensor in kept.items()}
        everything["snapshot"] = kept_numbers
    return tensors, everything


def save(directory: Path, run: MetaStep, extra: dict[str, Any] | None = None) -> Path:
    """Writes a checkpoint of the run under `directory`; call it on every rank.

    Args:
        directory: the run's `checkpoints/`.
        run: between two inner steps.
        extra: JSON values that `load` returns.

    Raises:
        UsageError: phi differs between ranks, or the disk is full (nothing half-written is left behind).
    """
    world, active = run.world, run.active
    active.check_modules()
    world.same(run.initialization.digest(), f"phi at step {run.step}")
    final = directory / f"{run.step:09d}"
    temporary = directory / f"{final.name}.tmp"
    shared, numbers = _shared_state(run)
    failure = world.gather(_make_anew(temporary) if world.rank == 0 else "")[0]
    files: dict[str, str] = {}
    tasks: dict[str, Any] = {}
    try:
        if world.rank == 0 and not failure:
            files[SHARED] = _write(temporary / SHARED, _pack(shared))
        for index, name in enumerate(active.tasks):
            if active.home[name] == world.rank and not failure:
                file = _file_name(index, name)
                tensors, task_numbers = _task_state(run, name)
                files[file] = _write(temporary / file, _pack(tensors))
                tasks[name] = {"file": file, "numbers": task_numbers}
    except OSError as error:
        failure = str(error)
    gathered = world.gather((files, tasks, failure))
    failure = next((one for _, _, one in gathered if one), "")
    if world.rank == 0 and not failure:
        manifest = {
            "numbers": numbers,
            "files": dict(sorted(pair for files, _, _ in gathered for pair in files.items())),
            "tasks": {name: one[name] for name in active.tasks for _, one, _ in gathered if name in one},
            "extra": extra or {},
        }
        failure = _finish(temporary, final, manifest)
    failure = world.gather(failure)[0]
    if failure:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(
            f"the checkpoint of step {run.step} could not be written to {directory} ({failure}); "
            "free some space and resume the run"
        )
    return final


def _make_anew(temporary: Path) -> str:
    """Makes an empty folder; returns what went wrong, if anything did."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _finish(temporary: Path, final: Path, manifest: dict[str, Any]) -> str:
    """Writes the manifest and renames the checkpoint into place; returns what went wrong, if anything did."""
    try:
        sealed = manifest | {"checksum": _digest(manifest)}
        _write(temporary / MANIFEST, json.dumps(sealed, indent=1).encode())
        _sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_directory(final.parent)
    except OSError as error:
        return str(error)
    return ""


# -- finding and checking ------------------------------------------------------------------------------------


def steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints under `directory`, ascending."""
    return list(checkpoint_folders(directory))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing every file's checksum.

    Raises:
        UsageError: names the checkpoint and the damaged or missing file.
    """
    try:
        manifest = manifest_of(path)
        files, intact = manifest["files"].items(), manifest["checksum"] == _digest(manifest)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{first_line(error).removesuffix('; delete it')}; use another one") from error
    damaged = [MANIFEST] if not intact else [name for name, digest in files if _sha256(path / name) != digest]
    if damaged:
        raise UsageError(f"checkpoint {path} is damaged: {damaged[0]} is missing or changed; use another one")
    return manifest


def _sha256(file: Path) -> str | None:
    try:
        return sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def latest_valid(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, or None, and a sentence for each newer damaged one."""
    damaged = []
    for step in reversed(steps(directory)):
        path = directory / f"{step:09d}"
        try:
            verify(path)
        except UsageError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def prune(directory: Path, keep: int | None, step: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints (None keeps all), and what a killed run left half-written.

    Those after `step`, the run's current step, are deleted too: resuming skipped them because they are damaged.
    """
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.endswith(".tmp"):
            shutil.rmtree(path, ignore_errors=True)
    found = steps(directory)
    kept = [one for one in found if step is None or one <= step][-(keep or 0) :]
    for one in set(found) - set(kept):
        shutil.rmtree(directory / f"{one:09d}", ignore_errors=True)


# -- loading -------------------------------------------------------------------------------------------------


def load(path: Path, run: MetaStep) -> dict[str, Any]:
    """Puts a checkpoint into a freshly made run, at any world size; returns `extra`. Call it on every rank.

    Tasks may have joined or left if the checkpoint is at a round boundary.

    Raises:
        UsageError: a damaged checkpoint, one that belongs to another model, other tasks in the middle of a
            round, or ranks that loaded different ones.
    """
    manifest = verify(path)
    numbers, tasks = manifest["numbers"], manifest["tasks"]
    run.step = numbers["step"]
    if run.k and list(tasks) != list(run.active.tasks):
        raise UsageError(
            f"checkpoint {path} is in the middle of a round, where tasks cannot join or leave; "
            "resume with the tasks it was made with"
        )
    _load_shared(path, run, numbers)
    states = {name: parse((path / tasks[name]["file"]).read_bytes()) for name in run.active.local if name in tasks}
    run.active.waiting = {name: _only(tensors, OWN) for name, tensors in states.items() if tensors}
    seated = [name for name in states if name in numbers["seated"]]
    run.active.resume(seated, (run.step - 1) // run.horizon if run.k else None)
    run.counters.seat(run.active.names)
    for row, learner in enumerate(run.learners):
        _load_row(run, row, states[learner.task.name], tasks[learner.task.name]["numbers"])
    if run.k:
        run.meta_gradient.begin(run.theta)
        run.carry.begin(run)
        rows = [states[name] for name in run.active.names]
        if rows:
            run.meta_gradient.load(_stacked(rows, "metagrad/", run.device))
            run.carry.load(_stacked(rows, "carry/", run.device))
    run.world.same(run.initialization.digest(), f"phi of the checkpoint of step {run.step}")
    extra: dict[str, Any] = manifest["extra"]
    return extra


def _load_shared(path: Path, run: MetaStep, numbers: dict[str, Any]) -> None:
    shared = parse((path / SHARED).read_bytes())
    views = run.layout.views(run.phi)
    unknown = sorted(_strip(shared, "phi/").keys() - views.keys())
    if unknown:
        raise UsageError(
            f"checkpoint {path} belongs to another model: {unknown[0]!r} is not shared here; use that model"
        )
    for name, view in views.items():
        saved = shared.get(f"phi/{name}")
        if saved is None or saved.shape != view.shape or saved.dtype != view.dtype:
            what = f"{name!r} of shape {tuple(view.shape)} and {view.dtype}"
            raise UsageError(
                f"checkpoint {path} belongs to another model: it has no {what}; use the model it was made with"
            )
        view.copy_(saved)
    if "from_phi" in numbers:  # older checkpoints have no constants
        run.active.blueprint.constants.load(_strip(shared, "constant/"), numbers["from_phi"])
    run.meta_optimizer.load({n: t.to(run.device) for n, t in _strip(shared, "outer/").items()}, numbers["outer"])
    run.counters.update_norm.copy_(shared["update_norm"])
    run.pending = None
    if pending := _strip(shared, "pending/"):
        gradient = run.layout.flatten(pending, out=torch.zeros_like(run.phi))
        run.pending = lambda: gradient
    run.counters.inner_steps = numbers["inner_steps"]
    run.counters.counts = Counter(numbers["counts"] if run.world.rank == 0 else {})
    if run.observer is not None:
        run.observer.load(numbers.get("readings", ()) if run.world.rank == 0 else ())


def _load_row(run: MetaStep, row: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    learner = run.learners[row]
    learner.load(tensors, numbers["optimizer"])
    run.counters.loss_sum[row] = tensors["tally/loss_sum"]
    run.counters.loss_count[row] = numbers["loss_count"]
    run.counters.first_bad_step[row] = tensors["tally/first_bad_step"]
    if run.k:
        run.layout.flatten(_strip(tensors, "theta/"), out=run.theta[row])
    if "snapshot" in numbers:
        run.active.snapshots[learner.task.name] = (_strip(tensors, "snapshot/"), numbers["snapshot"])


def _stacked(states: list[dict[str, Tensor]], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """What the learners saved under the prefix, `[T, ...]` by label."""
    rows = [_strip(tensors, prefix) for tensors in states]
    return {label: torch.stack([row[label] for row in rows]).to(device) for label in rows[0]}


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _only(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
