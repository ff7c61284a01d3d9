"""What stops a run or a resume, each in one sentence that names the thing, and leaves a good checkpoint behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import toys
from trajshift import Inner, MetaTrainer, models
from trajshift.cli import main
from trajshift.data.batches import TaskBatches
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.recipes.recipe import load
from trajshift.runs.directory import RunDirectory
from trajshift.runs.train import Signals, train
from trajshift.settings import SHORT_NAMES
from trajshift.training import checkpoint

TINY = [
    "horizon=6", "rounds=2", "batch_size=4", "threads=1", "model.options.width=4", "train_on=[upright,few-classes]",
    "output.log_every=3", "output.checkpoint_every=2", "output.keep=null", "output.tensorboard=false",
]  # fmt: skip
END = 12


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def go(run: Path, *changes: str, resume: bool = False, recipe: str = "digits") -> Path:
    return train(load(recipe, [*TINY, *changes]), run, resume=resume, quiet=True).path


def results(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", run / "initialization.safetensors", *sorted(run.glob("checkpoints/*/*"))]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and stderr of `trajshift WORDS`."""
    sys.argv, before = ["trajshift", *words], sys.argv
    capsys.readouterr()
    try:
        main.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds with a checkpoint every second step."""
    return go(tmp_path_factory.mktemp("whole") / "run")


def stopped(whole: Path, tmp_path: Path, step: int) -> Path:
    """A copy of the finished run as it was after a kill behind the checkpoint of a step."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "initialization.safetensors").unlink()
    for later in checkpoint.steps(run / "checkpoints"):
        if later > step:
            shutil.rmtree(run / "checkpoints" / f"{later:09d}")
    return run


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [b"", b"{", b'{"step": 99, "rou', b'{"step": 99}\n{"st'])
def test_rows_after_the_checkpoint_are_cut(left: bytes, whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 8)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(left)
    with open(run / "timing.jsonl", "ab") as file:
        file.write(left)
    assert results(go(run, resume=True)) == results(whole)
    assert [row["step"] for row in rows(run / "timing.jsonl")] == [3, 6, 9, 12]


def test_lost_rows_are_told(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 8)
    os.truncate(run / "metrics.jsonl", 100)
    with pytest.raises(UsageError, match=r"metrics\.jsonl has 100 bytes, but had \d+ at the checkpoint of step 8"):
        go(run, resume=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(whole, tmp_path, 8)
    for step, name in ((8, "task-0001-few-classes.safetensors"), (6, "manifest.json")):
        file = run / "checkpoints" / f"{step:09d}" / name
        file.write_bytes(file.read_bytes()[:-1])
    go(run, resume=True)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    for line, step, name in zip(told, (8, 6), ("task-0001-few-classes.safetensors", "manifest.json"), strict=True):
        assert f"checkpoints/{step:09d}" in line
        assert name in line
    assert results(run) == results(whole)


def test_without_a_good_checkpoint_the_run_starts_anew(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 2)
    (run / "checkpoints" / "000000002" / "shared.safetensors").unlink()
    assert results(go(run, resume=True)) == results(whole)


def failing_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk is full when the checkpoint of a step is written."""
    original = checkpoint._write

    def write(path: Path, content: bytes) -> str:
        if path.parent.name == f"{step:09d}.tmp" and path.name == checkpoint.MANIFEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, content)

    monkeypatch.setattr(checkpoint, "_write", write)


def test_the_one_checkpoint_kept_is_never_the_damaged_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(whole, tmp_path, 8)
    for step in (6, 8):
        (run / "checkpoints" / f"{step:09d}" / "shared.safetensors").unlink()
    failing_at(monkeypatch, 6)
    with pytest.raises(UsageError, match="No space left"):
        go(run, "output.checkpoint_every=1", "output.keep=1", resume=True)
    assert checkpoint.latest_valid(run / "checkpoints") == (run / "checkpoints" / "000000005", [])


# -- what may change -----------------------------------------------------------------------------------------

REFUSED = [
    "method=reptile", "horizon=3", "meta_lr=0.3", "meta_every=2", "carry=hold", "seed=1", "batch_size=5",
    "tasks_per_round=1", "renew=[heads]", "grad_clip=1", "threads=2", "autocast=bfloat16", "inner.lr=0.5",
    "inner.options.momentum=0.8", "inner.schedule=cosine", "inner.flat=true", "meta.optimizer=adam",
    "model.options.width=5", "model.name=resnet20", "data.crop_padding=0", "data.flip=true",
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_other_changes_are_refused_by_name(change: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(whole)
    status, told = command(capsys, "train", str(whole), change, "--resume", "--quiet")
    name, _, value = change.partition("=")
    field = SHORT_NAMES.get(name, name)
    assert status == 2
    assert told.startswith(f"trajshift: {whole} was started with another recipe: {field.partition('.options')[0]}")
    assert value.strip("[]") in told.lower()
    assert told.count("\n") == 1
    assert results(whole) == before


def test_more_rounds_end_as_if_asked_for_at_first(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, END)
    assert results(go(run, "rounds=3", resume=True)) == results(go(tmp_path / "long", "rounds=3"))


def test_output_and_unused_tasks_may_change_anywhere(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 8)
    changes = ["output.log_every=1", "output.keep=1", "output.checkpoint_every=null", "output.directory=elsewhere"]
    go(run, *changes, "targets.six-to-nine=null", f"data.root={tmp_path}", resume=True)
    assert results(run)["initialization.safetensors"] == results(whole)["initialization.safetensors"]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [3, 6, 9, 10, 11, 12]
    assert checkpoint.steps(run / "checkpoints") == [END]
    assert "six-to-nine" not in load(run).targets


def test_tasks_may_change_between_rounds(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 6)
    go(run, "train_on=[few-classes,turned]", resume=True)
    assert [list(row["tasks"]) for row in rows(run / "metrics.jsonl")] == [["upright", "few-classes"]] * 2 + [
        ["turned", "few-classes"]
    ] * 2
    assert load(run).train_on == ["few-classes", "turned"]


@pytest.mark.parametrize("change", ["train_on=[upright]", "tasks.upright.crop_padding=0", "tasks.upright=null"])
def test_tasks_do_not_change_inside_a_round(change: str, whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 8)
    changes = [change] if change.startswith("train_on") else ["train_on=null", change]
    with pytest.raises(UsageError, match=r"may change only between rounds, but the newest checkpoint is at step 8"):
        go(run, *changes, resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["rounds=1"], "rounds is 1, which ends at step 6, but step 12 is already done"),
        (["train_on=[upright]"], "train_on was changed, but the run is complete at step 12; raise rounds too"),
    ],
)
def test_a_finished_run_says_what_to_do(changes: list[str], sentence: str, whole: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        go(whole, *changes, resume=True)


def test_a_finished_run_resumed_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert results(go(run, resume=True)) == results(whole)


def test_a_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(UsageError, match="already contains a run; continue it with --resume"):
        go(whole)


def test_two_processes_do_not_train_one_run(whole: Path) -> None:
    other = RunDirectory(whole)
    other.lock()
    with pytest.raises(UsageError, match="is being trained by another process"):
        go(whole, resume=True)
    other.unlock()
    go(whole, resume=True)


def test_checkpoints_of_another_recipe_are_refused(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path, 4)
    other = go(tmp_path / "other", "seed=1")
    shutil.copytree(other / "checkpoints" / "000000006", run / "checkpoints" / "000000006")
    with pytest.raises(UsageError, match="was written by another recipe"):
        go(run, resume=True)


# -- losses that are not finite ------------------------------------------------------------------------------


def first_step_with_the_poison(name: str) -> int:
    batches = TaskBatches(toys.poisoned(name), seed=0, batch_size=4)
    return 1 + next(step for step in range(5) if 0 in batches.indices(step))


@pytest.mark.parametrize("method", ["trajectory-shifting", "reptile"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_the_poisoned_task_is_named(how: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in ("bad", "worse", "rotten") if first_step_with_the_poison(name) > 2)
    step = first_step_with_the_poison(name)
    tasks = [
        f"tasks.{name}.source=tests.helpers.toys:poisoned",
        f"tasks.{name}.options.how={how}",
        "tasks.fine.source=tests.helpers.toys:poisoned",
    ]
    words = [*TINY, *tasks, f"train_on=[fine,{name}]", f"method={method}", f"output.directory={tmp_path}"]
    status, told = command(capsys, "train", "digits", *words, "--name", "run", "--quiet")
    assert status == 2
    assert told.count("\n") == 1
    assert f"of task '{name}' is not finite at inner step {step} (inner lr 0.02, meta_lr " in told
    good = (step - 1) // 2 * 2
    assert f"the last good checkpoint, step {good}, is kept" in told
    newest, notes = checkpoint.latest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert (newest.name, notes) == (f"{good:09d}", [])
    for file in newest.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_a_culprit_that_left_is_named_all_the_same() -> None:
    listed = [toys.poisoned("a"), toys.poisoned("bad", "loss"), toys.poisoned("c")]
    trainer = MetaTrainer(
        lambda task: models.build_model("conv", task, width=4), listed,
        horizon=5, rounds=8, batch_size=4, tasks_per_round=1, inner=Inner(lr=0.01, options={}),
    )  # fmt: skip
    first_round = next(round for round in range(8) if trainer.meta_step.active.sampled(round) == ["bad"])
    assert first_round < 7
    for _ in trainer:
        pass
    step = 5 * first_round + first_step_with_the_poison("bad")
    with pytest.raises(NonFiniteLoss, match=f"task 'bad' is not finite at inner step {step} "):
        trainer.check_finite()


# -- full disks ----------------------------------------------------------------------------------------------


def test_no_space_for_a_checkpoint(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(monkeypatch, 8)
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=r"the checkpoint of step 8 could not be written .* No space left"):
        go(run)
    monkeypatch.undo()
    assert checkpoint.steps(run / "checkpoints") == [2, 4, 6]
    assert not list(run.rglob("*.tmp"))
    assert results(go(run, resume=True)) == results(whole)


def test_no_space_for_a_row(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="no space left on the disk"):
        go(run)
    (run / "metrics.jsonl").unlink()
    assert checkpoint.steps(run / "checkpoints") == [2]
    assert results(go(run, resume=True)) == results(whole)  # in the same process: nothing is left locked or open


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 8 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_no_space_anywhere(whole: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits", *TINY, f"output.directory={small_disk}", "--name", "run", "--quiet", "--resume"]
    run, told_at = small_disk / "run", set()
    for size in (8, 16, 24, 36, 48, 64, 80, 112):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        status, told = command(capsys, *words)
        assert status == 2, size
        assert told.startswith("trajshift: ")
        assert told.count("\n") == 1
        assert "no space left on" in told.lower()
        assert not list(run.glob("checkpoints/*.tmp"))
        told_at.add(tuple(checkpoint.steps(run / "checkpoints")))
    assert len(told_at) > 2
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert command(capsys, *words)[0] == 0
    assert results(run) == results(whole)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, told = command(capsys, "train", "digits", *TINY, f"output.directory={tmp_path / 'file'}", "--quiet")
    assert (status, told.count("\n")) == (2, 1)
    assert "cannot write to" in told


def test_a_second_interrupt_is_obeyed_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_timing_is_said_and_stops_no_progress(tmp_path: Path) -> None:
    run = RunDirectory(go(tmp_path / "run"))
    assert run.last_step() == END
    with open(run.path / "timing.jsonl", "a") as file:
        file.write("garbage\n")
    assert run.last_step() == 0
    with pytest.raises(UsageError, match=r"timing.jsonl is damaged .*; fix or delete the line"):
        go(run.path, "rounds=3", resume=True)
