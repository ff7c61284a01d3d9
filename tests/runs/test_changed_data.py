"""Rows and runs know the data they were made on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trajshift.data import fingerprint
from trajshift.data.fingerprint import changed, examples_digest, files_digest, touched
from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, load
from trajshift.runs.collect_rows import FILE, collect, read_evaluation
from trajshift.runs.evaluate_runs import evaluate_runs
from trajshift.runs.train import train
from trajshift.task import Task

RECIPE = """
method: reptile
horizon: 2
rounds: {rounds}
batch_size: 4
threads: 1
model: {{name: conv, options: {{width: 2, depth: 1}}}}
data: {{root: {root}}}
tasks: {{a: {{source: "npz:a.npz"}}}}
targets: {{t: {{source: "npz:t.npz"}}}}
finetune: {{steps: 1, batch_size: 4}}
output: {{tensorboard: false}}
"""
OWN = {"offset": 0.0}


def npz(file: Path, seed: int) -> None:
    r = np.random.default_rng(seed)
    x = r.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(file, x_train=x, y_train=np.arange(12) % 2, x_test=x[:6], y_test=np.arange(6) % 2)


def recipe(folder: Path, rounds: int = 1) -> Recipe:
    (folder / "mine.yaml").write_text(RECIPE.format(root=folder / "data", rounds=rounds))
    return load(folder / "mine.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    npz(tmp_path / "data" / "a.npz", 0)
    npz(tmp_path / "data" / "t.npz", 1)
    train(recipe(tmp_path), tmp_path / "run", quiet=True)
    return tmp_path


def test_a_target_that_changed_is_fine_tuned_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    first = evaluate_runs([run])
    shutil.copytree(folder / "data", folder / "copy")  # the same data at another place, with other times
    assert evaluate_runs([run], overrides=[f"data.root={folder / 'copy'}"]) == first
    assert capsys.readouterr().err == ""
    npz(folder / "copy" / "t.npz", 5)
    second = evaluate_runs([run], overrides=[f"data.root={folder / 'copy'}"])
    assert "has changed since it was fine-tuned" in capsys.readouterr().err
    assert second[0].metrics["loss"] != first[0].metrics["loss"]
    assert evaluate_runs([run]) == first, "rows on the first data are still there"
    npz(folder / "data" / "t.npz", 5)
    assert evaluate_runs([run])[0].metrics == second[0].metrics
    assert len(read_evaluation(run)) == 2
    rows, notes = collect([run])
    assert [row.metrics for row in rows] == [second[0].metrics]
    assert "because the data has changed" in notes[0]


def test_rows_of_0_1_without_digests_are_found_again(folder: Path) -> None:
    run = folder / "run"
    rows = evaluate_runs([run])
    old = replace(rows[0], data=None, run=None)
    for file in run.glob(f"{FILE}*"):
        file.unlink()
    from trajshift.utils.files import append_row

    append_row(run / FILE, old.to_json())
    assert "data" not in old.to_json()
    assert evaluate_runs([run])[0].metrics == old.metrics
    assert len(read_evaluation(run)) == 1


def test_a_resume_on_changed_data_is_refused(folder: Path) -> None:
    npz(folder / "data" / "a.npz", 7)
    with pytest.raises(UsageError, match=r"the data of task 'a' .* has changed since"):
        train(recipe(folder, 2), folder / "run", resume=True, quiet=True)
    npz(folder / "data" / "a.npz", 0)
    assert train(recipe(folder, 2), folder / "run", resume=True, quiet=True).complete
    npz(folder / "data" / "a.npz", 7)
    (folder / "run" / "data.json").unlink()  # as version 0.1
    assert train(recipe(folder, 3), folder / "run", resume=True, quiet=True).complete


def own(name: str) -> Task:
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + OWN["offset"]
    return Task(name=name, train=(x, torch.arange(12) % 2), outputs=2, input_shape=(3, 8, 8))


def test_data_in_memory_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    recipe(tmp_path)
    text = (tmp_path / "mine.yaml").read_text().replace("npz:a.npz", f"{__name__}:own")
    (tmp_path / "mine.yaml").write_text(text)
    train(load(tmp_path / "mine.yaml"), tmp_path / "run", quiet=True)
    monkeypatch.setitem(OWN, "offset", 1.0)
    with pytest.raises(UsageError, match=r"the data of task 'a' .* has changed since"):
        train(load(tmp_path / "mine.yaml", ["rounds=2"]), tmp_path / "run", resume=True, quiet=True)
    monkeypatch.setitem(OWN, "offset", 0.0)
    assert train(load(tmp_path / "mine.yaml", ["rounds=2"]), tmp_path / "run", resume=True, quiet=True).complete


class Restless:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        OWN["offset"] += 1
        return torch.full((2,), OWN["offset"]), 0


def test_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "big"
    file.write_bytes(bytes(5000))
    assert files_digest(tmp_path / "gone") is None
    whole = files_digest(file)
    assert whole is not None
    assert "." not in whole
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 1000)
    sampled = files_digest(file)
    file.write_bytes(bytes(5000))
    assert touched(sampled, files_digest(file))
    file.write_bytes(bytes(4999) + b"x")
    assert changed(sampled, files_digest(file))
    file.write_bytes(bytes(5001))
    assert changed(sampled, files_digest(file))
    assert not changed(None, sampled)
    x = torch.arange(6.0)
    assert examples_digest(x, None) == examples_digest(x.clone(), None) != examples_digest(x, x)
    assert examples_digest(x, None) != examples_digest(x.view(6, 1), None) != examples_digest(x.flip(0), None)
    assert examples_digest(Restless(), None) is None


def test_a_moved_initialization_does_not_forbid_a_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = folder / "w.safetensors"
    shutil.copy(folder / "run" / "initialization.safetensors", start)
    own = replace_start(recipe(folder), start)
    whole = train(replace_start(recipe(folder, 3), start), folder / "whole", quiet=True).path
    train(own, folder / "r", quiet=True)
    (folder / "weights").mkdir()
    moved = folder / "weights" / "w.safetensors"
    start.rename(moved)
    assert train(replace_start(recipe(folder, 2), start), folder / "r", resume=True, quiet=True).complete
    assert "phi is taken from the checkpoint" in capsys.readouterr().err
    other = folder / "run" / "initialization.safetensors"
    shutil.copy(whole / "initialization.safetensors", other)
    with pytest.raises(UsageError, match="started from another file"):
        train(replace_start(recipe(folder, 3), other), folder / "r", resume=True, quiet=True)
    assert train(replace_start(recipe(folder, 3), moved), folder / "r", resume=True, quiet=True).complete
    phis = [(run / "initialization.safetensors").read_bytes() for run in (folder / "r", whole)]
    assert phis[0] == phis[1]
    with pytest.raises(UsageError, match="there is no initialization at"):
        evaluate_runs([folder / "whole"], scratch=True)


def replace_start(recipe: Recipe, start: Path) -> Recipe:
    recipe.initialization = str(start)
    return recipe
