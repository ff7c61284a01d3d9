"""A run that was killed, stopped or damaged ends in the same bytes as one that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.deaths import Death, train
from tests.helpers.processes import start, start_ranks, wait
from tests.helpers.waiting import PATIENCE
from trajshift.runs.train import kernels_of
from trajshift.training import checkpoint

HELPERS = Path(__file__).parents[1] / "helpers"
TINY = [
    "digits", "horizon=6", "rounds=12", "batch_size=4", "threads=1", "model.options.width=4",
    "train_on=[upright,turned,few-classes]",
    "output.log_every=3", "output.checkpoint_every=4", "output.tensorboard=false",
]  # fmt: skip
METHODS = {
    "shifting": ["inner.schedule=cosine", "output.error_every=2"],
    "accurate": ["method=accurate", "horizon=3", "rounds=16", "inner.optimizer=adam", "inner.lr=0.001"],
    "sampled": ["method=leap", "tasks_per_round=2", "renew=[statistics]", "meta.optimizer=adam", "meta_lr=0.01"],
}
"""72, 48 and 72 inner steps: enough for all deaths, however fast the machine."""
draw = random.Random(7)


def moments(count: int) -> list[Death]:
    """Random moments, each a few steps after the last resume."""
    return [Death("step", draw.randint(1, 5), draw.uniform(0.0, 0.05)) for _ in range(count)]


DEATHS = {
    "shifting": [
        Death("start", delay=draw.uniform(0.05, 0.5)),
        Death("write", 1),  # the first file of the first checkpoint
        Death("write", 5),  # its manifest
        Death("sync", 1),  # before its rename
        Death("row", 2),
        *moments(2),
        Death("sync", 2),  # after the rename
        Death("write", 3),
        *moments(2),
        Death("prune", 1),
        *moments(1),
    ],
    "accurate": [*moments(1), Death("write", 2), *moments(1), Death("write", 7), Death("end")],
    "sampled": [*moments(1), Death("write", 5), *moments(1), Death("sync", 2), Death("row", 1), *moments(1)],
}


def command(folder: Path, name: str, *changes: str) -> list[str]:
    """The words after `trajshift` that start the run `folder/name`, or go on with it."""
    return ["train", *TINY, *changes, f"output.directory={folder}", "--name", name, "--quiet", "--resume"]


def results(run: Path) -> dict[str, bytes]:
    """All that must not depend on what happened on the way."""
    files = [run / "metrics.jsonl", run / "initialization.safetensors", *sorted(run.glob("checkpoints/*/*"))]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def one_process(words: list[str], death: Death | None, log: Path) -> int | None:
    return wait(start(train, words, death, log=log))[0]


def ranks(words: list[str], death: Death | None, logs: Path) -> list[int | None]:
    """Two ranks; as torchrun does, the other is told to stop once one has died."""
    processes = start_ranks(train, 2, words, death, logs=logs)
    if death is not None and death.number == signal.SIGKILL:
        wait(processes[death.rank])
        processes[1 - death.rank].terminate()
    return wait(*processes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody disturbed, the first from a shell's command line."""
    folder = tmp_path_factory.mktemp("alone")
    first = [sys.executable, "-m", "trajshift", *command(folder, "shifting", *METHODS["shifting"])]
    assert subprocess.run(first, capture_output=True).returncode == 0
    for name in ("accurate", "sampled"):
        assert one_process(command(folder, name, *METHODS[name]), None, folder / "log.txt") == 0
    assert ranks(command(folder, "two-ranks", *METHODS["shifting"]), None, folder) == [0, 0]
    return folder


# -- kills ---------------------------------------------------------------------------------------------------


def test_at_least_twenty_kills() -> None:
    assert sum(map(len, DEATHS.values())) + len(RANK_DEATHS) + 1 >= 20


@pytest.mark.parametrize("name", METHODS)
def test_killed_again_and_again(name: str, alone: Path, tmp_path: Path) -> None:
    words, log = command(tmp_path, name, *METHODS[name]), tmp_path / "log.txt"
    for death in DEATHS[name]:
        assert one_process(words, death, log) == -signal.SIGKILL, f"{death}\n{log.read_text()}"
    assert one_process(["train", str(tmp_path / name), "--resume"], None, log) == 0, log.read_text()
    assert results(tmp_path / name) == results(alone / name)
    assert not [*(tmp_path / name).rglob("*.tmp"), *(tmp_path / name).rglob("*.new")]


RANK_DEATHS = [
    Death("step", draw.randint(5, 8), draw.uniform(0.0, 0.05), rank=1),
    Death("write", 1, rank=1),  # a task's file
    Death("write", 4),  # the manifest: one task lies on this rank, or two
    Death("step", draw.randint(5, 8), draw.uniform(0.0, 0.05)),
]


def test_one_rank_of_two_killed(alone: Path, tmp_path: Path) -> None:
    words = command(tmp_path, "two-ranks", *METHODS["shifting"])
    for death in RANK_DEATHS:
        exits = ranks(words, death, tmp_path)
        assert exits[death.rank] == -signal.SIGKILL, (tmp_path / f"rank-{death.rank}.txt").read_text()
        assert exits[1 - death.rank] not in (0, None)
    assert ranks(words, None, tmp_path) == [0, 0], (tmp_path / "rank-0.txt").read_text()
    assert results(tmp_path / "two-ranks") == results(alone / "two-ranks")


def test_one_rank_killed_under_torchrun(alone: Path, tmp_path: Path) -> None:
    words = command(tmp_path, "two-ranks", *METHODS["shifting"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    driver = [str(HELPERS / "deaths.py"), "1", "step", "7", "--"]
    out = subprocess.run([*torchrun, *driver, *words], capture_output=True, text=True, timeout=PATIENCE)
    assert out.returncode != 0
    assert "exitcode  : -9" in out.stderr, out.stderr
    assert checkpoint.steps(tmp_path / "two-ranks" / "checkpoints") == [4]
    assert ranks(words, None, tmp_path) == [0, 0]
    assert results(tmp_path / "two-ranks") == results(alone / "two-ranks")


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number: int, alone: Path, tmp_path: Path) -> None:
    words, log = command(tmp_path, "shifting", *METHODS["shifting"]), tmp_path / "log.txt"
    loud = [word for word in words if word != "--quiet"]
    assert one_process(loud, Death("step", 7, number=number), log) == 128 + number
    assert checkpoint.steps(tmp_path / "shifting" / "checkpoints") == [4, 7]
    assert "stopped at step 7 with a checkpoint; continue with: trajshift train --resume" in log.read_text()
    assert one_process(words, Death("step", 4, number=number), log) == 128 + number
    assert checkpoint.steps(tmp_path / "shifting" / "checkpoints") == [7, 8, 11]
    assert one_process(words, None, log) == 0
    assert results(tmp_path / "shifting") == results(alone / "shifting")


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_agree_on_the_step(rank: int, alone: Path, tmp_path: Path) -> None:
    words = command(tmp_path, "two-ranks", *METHODS["shifting"])
    exits = ranks(words, Death("step", 7, number=signal.SIGTERM, rank=rank), tmp_path)
    assert exits == [128 + signal.SIGTERM] * 2, (tmp_path / "rank-0.txt").read_text()
    assert checkpoint.steps(tmp_path / "two-ranks" / "checkpoints") == [4, 8, 10]
    assert ranks(words, None, tmp_path) == [0, 0]
    assert results(tmp_path / "two-ranks") == results(alone / "two-ranks")


def test_a_run_moves_between_one_and_two_ranks(alone: Path, tmp_path: Path) -> None:
    words, log = command(tmp_path, "moved", *METHODS["shifting"]), tmp_path / "log.txt"
    stop = Death("step", 7, number=signal.SIGTERM)
    assert ranks(words, stop, tmp_path) == [128 + signal.SIGTERM] * 2
    assert one_process(words, stop, log) == 128 + signal.SIGTERM
    assert ranks(words, None, tmp_path) == [0, 0], (tmp_path / "rank-0.txt").read_text()
    rows = [(run / "metrics.jsonl").read_text().count("\n") for run in (tmp_path / "moved", alone / "two-ranks")]
    assert rows == [24, 24]


def test_the_choice_of_kernels_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run of a version that had no fused kernels resumes without them."""
    assert kernels_of(tmp_path) == "eager"
    choices = tmp_path / "choices.json"
    for kept, expected in (('{"engine": "loop"}', "eager"), ('{"kernels": "fused"}', "fused")):
        choices.write_text(kept)
        assert kernels_of(tmp_path) == expected
