"""The page about the user's own data and model does what it says: its files and commands, at a tiny scale."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import hub
from trajshift.cli.main import main
from trajshift.errors import UsageError
from trajshift.runs.sweep import parse_grid, points_of

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

PAGE = (Path(__file__).parents[2] / "docs" / "your-data.md").read_text()
TINY = ["horizon=2", "rounds=1", "batch_size=4", "finetune.steps=2", "finetune.batch_size=4", "threads=1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def commands(name: str) -> list[list[str]]:
    """The printed commands of one kind, without `trajshift`."""
    lines = [
        shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith(f"    trajshift {name} ")
    ]
    return [words[1:] for words in lines]


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's files, and data as it says they must be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the commands add the working directory
    for text in [*blocks("yaml"), *blocks("python")]:
        if found := re.match(r"# ([\w.]+)\n", text):
            (tmp_path / found[1]).write_text(text)
    root = tmp_path / "data"
    for name, shape in {"digits": (20, 20), "dev": (32, 32, 1), "mine": (40, 32, 3)}.items():
        root.mkdir(exist_ok=True)
        arrays = {f"x_{split}": pixels(20, *shape) for split in ("train", "test")}
        labels = {f"y_{split}": np.arange(20) % 10 for split in ("train", "test")}
        np.savez(root / f"{name}.npz", **arrays, **labels)
    for kind in ("cat", "dog", "owl"):
        (root / "pets" / kind).mkdir(parents=True)
        for image in pixels(5, 40 + len(kind), 36, 3):
            Image.fromarray(image).save(root / "pets" / kind / f"{image.sum()}.png")
    breeds = {"picture": [Image.fromarray(image) for image in pixels(8, 36, 40, 3)], "breed": ["pug", "collie"] * 4}
    features = datasets.Features({"picture": datasets.Image(), "breed": datasets.Value("string")})
    (root / "photos").mkdir()
    datasets.Dataset.from_dict(breeds, features=features).to_parquet(str(root / "photos" / "train.parquet"))
    with hub.offline(tmp_path / "cache"):
        yield tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trajshift", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_the_page_runs_as_printed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (train,) = commands("train")
    run([*train, *TINY, "--quiet"], monkeypatch)
    (evaluate,) = commands("evaluate")
    run([*evaluate[:-1], "10,all"], monkeypatch)
    assert "mine" in capsys.readouterr().out
    for words in commands("finetune") + commands("report"):
        run(words, monkeypatch)
    started = (work / "runs" / "mine-trajectory-shifting-seed0" / "choices.json").read_text()
    assert "cls.weight" not in started
    (load,) = [text for text in blocks("python") if not text.startswith("# ")]
    found: dict[str, torch.nn.Module] = {}
    exec(compile(load, "your-data.md", "exec"), found)
    assert found["model"](torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_printed_sweep_is_as_large_as_it_says() -> None:
    (sweep,) = commands("sweep")
    assert f"every combination ({len(points_of(parse_grid(sweep[2:])))} here" in PAGE


def test_a_folder_without_a_test_split_is_divided_by_class(work: Path) -> None:
    from trajshift.data import load_hf
    from trajshift.data.sources import labels_of

    whole, again = load_hf("data/pets", size=8, test=0.2), load_hf("data/pets", size=8, test=0.2)
    assert whole.test is not None
    assert again.test is not None
    held, kept = labels_of(whole.test), labels_of(whole.train)
    assert held is not None
    assert kept is not None
    assert held.tolist() == [0, 1, 2]
    assert torch.bincount(kept).tolist() == [4, 4, 4]
    every = load_hf("data/pets", size=8, test=None).train.fetch(torch.arange(15))[0]
    parts = [part.fetch(torch.arange(len(part)))[0] for part in (whole.train, whole.test)]
    assert sorted(torch.cat(parts).flatten(1).tolist()) == sorted(every.flatten(1).tolist())
    for share in (0.05, 1.0, 0):
        with pytest.raises(UsageError, match=f"test is {share}, which holds no image out"):
            load_hf("data/pets", size=8, test=share)
    assert torch.equal(parts[1], again.test.fetch(torch.arange(3))[0])
