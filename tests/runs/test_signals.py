"""A run that is told to stop, at any moment, ends in the same bytes as one that was left alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from trajshift.recipes.recipe import load
from trajshift.runs import train as driver
from trajshift.runs.train import train
from trajshift.training.trainer import MetaTrainer

TINY = ["horizon=6", "rounds=1", "batch_size=4", "threads=1", "model.options.width=4", "train_on=[upright]",
        "output.log_every=2", "output.checkpoint_every=4", "output.tensorboard=false"]  # fmt: skip


def results(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", run / "initialization.safetensors", *run.glob("checkpoints/000000006/*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load("digits", TINY), run, quiet=True)
    return results(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["build_trainer", "environment", "_announce", "_save", "save"])
def test_a_signal_outside_of_the_steps_is_as_exact_as_a_kill(
    place: str, number: signal.Signals, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While data is loaded, files are prepared, a checkpoint or phi is written."""
    from trajshift.learners.initialization import Initialization

    owner: Any = {"_announce": driver._Run, "_save": driver._Run, "save": Initialization}.get(place, driver)
    original = getattr(owner, place)

    sent: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        if place in ("build_trainer", "environment", "_announce"):
            with pytest.raises(SystemExit) as end:
                train(load("digits", TINY), tmp_path / "run", quiet=True)
            assert end.value.code == 128 + number
        else:
            outcome = train(load("digits", TINY), tmp_path / "run", quiet=True)
            assert outcome.complete == (place == "save")
            assert outcome.complete or outcome.signal == number
    assert signal.getsignal(number) == before
    assert train(load("digits", TINY), tmp_path / "run", resume=True, quiet=True).complete
    assert results(tmp_path / "run") == whole


@pytest.mark.parametrize("step", range(1, 7))
def test_a_signal_after_any_step(
    step: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MetaTrainer.advance

    def advance(trainer: MetaTrainer) -> Any:
        event = original(trainer)
        if event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return event

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "advance", advance)
        outcome = train(load("digits", TINY), tmp_path / "run", quiet=True)
    assert (outcome.step, outcome.complete) == (step, step == 6)
    assert train(load("digits", TINY), tmp_path / "run", resume=True, quiet=True).complete
    assert results(tmp_path / "run") == whole
