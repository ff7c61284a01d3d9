"""The study of the paper's regime at toy size: its tasks are the recipe's, it resumes, and it keeps to its minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studies.command import run_app
from studies.images import rows as image_rows
from studies.regime import finetune, meta_training, pack, train
from studies.regime.budget import Budget, run_seconds, trial_seconds
from studies.regime.rates import GRID, START, Rates, ScoreMissing, best_on_line, choose
from studies.regime.setting import METHODS, REGIME, SOURCES, TARGETS, TUNING, build_image_task
from studies.regime.train import balanced
from trajshift import load_initialization
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.recipe import load
from trajshift.runs import sweep
from trajshift.settings import Inner

TOY = replace(
    REGIME,
    horizon=4,
    rounds=3,
    kept=(1, 3),
    batch_size=2,
    model="conv",
    model_options={"width": 2, "depth": 1},
    log_every=2,
    tuning_rounds=1,
    finetune_steps=1,
    finetune_batch_size=2,
    finetune_images=4,
)
TWO = ("trajectory-shifting", "mtl")
GIVEN = ("--rates", "trajectory-shifting=0.02,0.05", "--rates", "mtl=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve sets: ten images of two classes in each part, grey or coloured, of 4 or 6 pixels."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate((*SOURCES, TUNING, *TARGETS)):
        shape = (20, 6 if name == "rsscn7" else 4, 6 if name == "rsscn7" else 4, 3 if number % 2 else 1)
        images = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        labels = np.arange(10) % 2
        np.savez(folder / f"{name}.npz", x_train=images[:10], y_train=labels, x_test=images[10:], y_test=labels)
    return folder


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands at toy size."""
    monkeypatch.setattr(train, "REGIME", TOY)
    monkeypatch.setattr(finetune, "REGIME", TOY)


def status(app: object, *words: object) -> int | str | None:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stopped:
        run_app(app, "studies", [*map(str, words)])  # type: ignore[arg-type]
    return stopped.value.code


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def trained(data: Path) -> Callable[..., list[dict[str, Any]]]:
    """Trains two methods by the command; returns the lines of runs.jsonl."""

    def work(out: Path, *words: object) -> list[dict[str, Any]]:
        options = ["--device", "cpu", "--size", 4, "--methods", ",".join(TWO), "--commit", "abc"]
        assert status(train.app, data, out, *options, *words) == 0
        return rows_of(out / "runs.jsonl") if (out / "runs.jsonl").exists() else []

    return work


# -- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (32, ["data.size=32", "data.crop_padding=4"]),
        (None, ["data.size=null", "data.crop_padding=4", "tasks.rsscn7.crop_padding=8"]),
    ],
)
def test_the_tasks_are_the_recipes(data: Path, size: int | None, changes: list[str]) -> None:
    recipe = load("small-images", [f"data.root={data}", *changes])
    assert tuple(recipe.tasks) == SOURCES
    assert tuple(recipe.targets) == TARGETS == image_rows.TARGETS
    assert tuple(recipe.tuning) == (TUNING,)
    for name, wanted in build_tasks(recipe, [*SOURCES, TUNING, *TARGETS]).items():
        task = build_image_task(name, data, size)
        assert (task.outputs, task.input_shape, task.weight) == (wanted.outputs, wanted.input_shape, wanted.weight)
        indices = torch.arange(10)
        for split in ("train", "test"):
            batch, expected = getattr(task, split).fetch(indices), getattr(wanted, split).fetch(indices)
            for key in (None, 7):  # as tested, and augmented
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(task.transform(batch, key), wanted.transform(expected, key), strict=True)
                )


def test_the_options_are_the_recipes() -> None:
    recipe = load("small-images")
    assert recipe.model.name == REGIME.model
    assert not recipe.model.options
    assert recipe.inner == Inner(lr=0.01)
    assert REGIME.finetune(recipe.finetune.lr) == recipe.finetune
    assert REGIME.finetune_lrs == image_rows.RATES
    assert sweep.RATES == GRID


def test_training_needs_neither_pydantic_nor_yaml_nor_scipy() -> None:
    absent = dict.fromkeys(("pydantic", "yaml", "scipy", "matplotlib", "PIL", "jinja2"))
    command = f"import sys; sys.modules.update({absent}); import studies.regime.train"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])


def test_packed_images_are_the_same_tensors(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(pack.app, data, tmp_path / "packed", "--size", 5) == 0
    together = tmp_path / "together"
    together.mkdir()
    for file in (tmp_path / "packed").glob("images-*/*"):
        (together / file.name).write_bytes(file.read_bytes())
    assert len([*together.glob("*.npz")]) == 9
    for name in (*SOURCES, TUNING):
        packed, whole = build_image_task(name, together, 5), build_image_task(name, data, 5)
        assert packed.outputs == whole.outputs
        for ours, theirs in zip(packed.train.fetch(torch.arange(10)), whole.train.fetch(torch.arange(10)), strict=True):
            assert torch.equal(ours, theirs)
        assert len(packed.test) == (10 if name == TUNING else 1)
    assert status(pack.app, data, tmp_path / "packed", "--size", 5) == 2
    assert status(train.app, together, tmp_path / "out", "--device", "cpu", "--methods", "mtl", "--rates", "mtl=1") == 2
    said = capsys.readouterr().err
    assert "is not empty" in said
    assert "were packed for size 5, not 32" in said


# -- rates -----------------------------------------------------------------------------------------------------


def search(method: str, score: Callable[[Rates], float]) -> tuple[Rates, list[Rates]]:
    """The rates chosen, and those tried in their order."""
    scores: dict[Rates, float] = {}
    while True:
        try:
            return choose(method, scores), list(scores)
        except ScoreMissing as missing:
            scores[missing.rates] = score(missing.rates)


@pytest.mark.parametrize("method", METHODS)
def test_every_search_begins_with_five_points(method: str) -> None:
    best = START[method]
    found, tried = search(method, lambda rates: 1.0 if rates == best else 0.5)
    assert found == best
    assert len(tried) == 5


def test_a_line_is_extended_while_its_best_is_an_end() -> None:
    tried: list[float] = []

    def score(rate: float) -> float:
        tried.append(rate)
        return -abs(rate - 1.0)

    assert best_on_line(score, 0.05, reach=1) == 1.0
    assert set(tried) == {0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0}
    assert best_on_line(lambda rate: 0.5, 0.05, reach=1) == 0.05
    assert best_on_line(lambda rate: -rate, 0.05, reach=1) == GRID[0]
    assert best_on_line(lambda rate: rate, 0.05, reach=1) == GRID[-1]


def test_the_meta_learning_rate_is_searched_at_the_best_inner_rate() -> None:
    found, tried = search("reptile", lambda rates: rates.inner_lr - 10 * (rates.inner_lr > 0.1) + (rates.meta_lr == 1))
    assert found == Rates(0.1, 1.0)
    assert {rates.meta_lr for rates in tried if rates.inner_lr != 0.1} == {2.0}


def test_tuning_resumes_and_its_rates_are_used(
    trained: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter(range(1, 100))
    monkeypatch.setattr(train.Loan, "accuracy", lambda *a: 1 / next(scores))  # the first tried is the best
    done = []
    real = train.Loan.try_rates
    monkeypatch.setattr(train.Loan, "try_rates", lambda loan, *a: done.append(a) or real(loan, *a))
    rows = trained(tmp_path, "--tune", "--seeds", 0)
    tried = rows_of(tmp_path / "tuning.jsonl")
    assert len(tried) == len(done)
    assert [row["method"] for row in tried[:4]] == [*TWO, *TWO]
    assert all(
        row["steps"] == 4 and row["target"] == TUNING and set(row["accuracy"]) == {"0.03", "0.1"} for row in tried
    )
    for row in rows:
        scored = {Rates(t["inner_lr"], t["meta_lr"]): t["score"] for t in tried if t["method"] == row["method"]}
        assert Rates(row["inner_lr"], row["meta_lr"]) == choose(row["method"], scored)
        assert row["tuned"] is True
    lines = (tmp_path / "tuning.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tuning.jsonl").write_text("".join(lines[:-1]))
    done.clear()
    assert trained(tmp_path, "--tune", "--seeds", 0) == rows
    assert len(done) == 1


def test_the_score_is_a_fine_tuning_of_mnist(trained: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    trained(tmp_path, "--tune", "--minutes", 0)
    assert not (tmp_path / "tuning.jsonl").exists()  # no time, nothing is begun
    trained(tmp_path, "--tune", "--seeds", 0, "--rates", "trajectory-shifting=0.02,0.05")
    tried = rows_of(tmp_path / "tuning.jsonl")
    assert {row["method"] for row in tried} == {"mtl"}
    assert all(row["score"] == max(row["accuracy"].values()) for row in tried)
    tuned = {row["method"]: row["tuned"] for row in rows_of(tmp_path / "runs.jsonl")}
    assert tuned == {"trajectory-shifting": False, "mtl": True}


# -- runs ------------------------------------------------------------------------------------------------------


def test_every_prefix_of_the_order_is_balanced() -> None:
    order = [*balanced(METHODS, (0, 1, 2))]
    assert len(set(order)) == len(order) == 12
    for end in range(1, 13):
        counts = [sum(method == name for method, _ in order[:end]) for name in METHODS]
        assert max(counts) - min(counts) <= 1


def test_a_run_leaves_phi_and_a_line(trained: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    rows = trained(tmp_path, *GIVEN, "--seeds", "0,1")
    assert [(row["method"], row["seed"]) for row in rows] == [*balanced(TWO, (0, 1))]
    for row in rows:
        assert (row["tuned"], row["commit"], row["torch"], row["size"]) == (False, "abc", torch.__version__, "4")
        assert row["device"]
        assert row["seconds"] >= row["set_up_seconds"] >= 0
        assert row["curve"]["step"] == [2, 4, 6, 8, 10, 12]
        assert set(row["curve"]["loss"]) == set(SOURCES)
        assert row["gradient_evaluations"] == 12 * len(SOURCES)
        assert list(row["phi"]) == ["4", "12"]
        for step, name in row["phi"].items():
            phi = load_initialization(tmp_path / name)
            assert (phi.about["method"], phi.about["seed"], phi.about["step"]) == (
                row["method"],
                row["seed"],
                int(step),
            )


def test_runs_are_not_done_again(
    trained: Callable[..., list[dict[str, Any]]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = trained(tmp_path, *GIVEN, "--seeds", 0)
    for file in (tmp_path / "phi").iterdir():
        file.unlink()  # stayed at home
    begun = []
    real = train.meta_train
    monkeypatch.setattr(train, "meta_train", lambda *a, **b: begun.append((a[1], b["seed"])) or real(*a, **b))
    more = trained(tmp_path, *GIVEN, "--seeds", "0,1")
    assert begun == [*balanced(TWO, (1,))]
    assert more[:2] == rows
    options = ["--device", "cpu", "--size", 4, "--methods", "mtl", "--rates", "mtl=0.2"]
    assert status(train.app, data, tmp_path, *options) == 2
    assert "contains mtl of seed 0 at inner rate 0.1, not inner rate 0.2; name another OUT" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_not_begun(
    trained: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (row,) = trained(tmp_path, *GIVEN, "--seeds", 0, "--methods", "mtl")
    slow = row | {"method": "reptile", "step_seconds": 10.0, "set_up_seconds": 1.0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(slow) + "\n")
    assert trained(tmp_path, *GIVEN, "--seeds", 0, "--minutes", 2) == [slow]  # 121 seconds are not there
    said = capsys.readouterr().out
    assert "0 of 2 runs are done; the next, trajectory-shifting of seed 0, takes about 2:01 min and " in said
    assert "rerun the same command to resume" in said
    assert len(trained(tmp_path, *GIVEN, "--seeds", 0, "--minutes", 5)) == 3


def test_a_run_that_turns_out_too_long_is_given_up(
    trained: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = []
    monkeypatch.setattr(Budget, "fits", lambda budget, seconds: asked.append(seconds) or len(asked) < 3)
    monkeypatch.setattr(meta_training, "time", SimpleNamespace(monotonic=count().__next__))  # a second at every look
    assert trained(tmp_path, *GIVEN, "--seeds", 0) == []
    assert asked[0] is None  # nothing is known before the first run
    assert asked[1] > asked[2] > 0  # seconds for two more rounds, then for one
    assert "the next, trajectory-shifting of seed 0, takes longer" in capsys.readouterr().out
    assert not (tmp_path / "phi").exists()


def test_what_is_left_of_the_minutes() -> None:
    now = [0.0]
    budget = Budget(1.0, clock=lambda: now[0])
    assert budget.fits(57)
    assert not budget.fits(58)  # with the margin
    assert budget.fits(None)
    now[0] = 60.0
    assert not budget.fits(None)


def test_what_work_takes_is_what_it_took_before() -> None:
    def row(method: str, step: float, device: str = "H200") -> dict[str, Any]:
        return {"method": method, "size": "32", "device": device, "step_seconds": step, "set_up_seconds": 5.0}

    wanted = {"size": "32", "device": "H200"}
    rows = [row("mtl", 1.0), row("mtl", 2.0), row("reptile", 3.0), row("reptile", 9.0, device="H100")]
    assert run_seconds(rows, 10, method="mtl", **wanted) == 25.0
    assert run_seconds(rows, 10, method="no-shifting", **wanted) == 35.0
    assert run_seconds(rows, 10, method="mtl", size="native", device="H200") is None
    tried = [{"trial_seconds": 6.0, **wanted}, {"trial_seconds": 4.0, **wanted}]
    assert trial_seconds(tried, **wanted) == 4.0
    assert trial_seconds([], **wanted) is None


def test_a_run_that_diverges_is_a_line_too(trained: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    rows = trained(tmp_path, "--rates", "mtl=1e30", "--rates", "trajectory-shifting=0.02,0.05", "--seeds", 0)
    assert [("error" in row, "phi" in row) for row in rows] == [(False, True), (True, False)]


# -- the CPU's half --------------------------------------------------------------------------------------------


def test_fine_tuning_resumes_and_its_tables_print(
    trained: Callable[..., list[dict[str, Any]]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, results = tmp_path / "out", tmp_path / "results"
    trained(out, *GIVEN, "--seeds", "0,1")
    words = [data, out, "--results", results, "--processes", 1]
    assert status(finetune.app, *words) == 0
    rows = rows_of(results / "rows.jsonl")
    # two seeds: scratch and two methods after two rounds, on three targets at two rates
    assert len(rows) == 2 * (1 + 2 * 2) * 3 * 2
    assert {row["inner_steps"] for row in rows} == {0, 4, 12}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert rows_of(results / "runs.jsonl") == rows_of(out / "runs.jsonl")
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    done = []
    real = finetune.work
    monkeypatch.setattr(finetune, "work", lambda job: done.append(job) or real(job))
    assert status(finetune.app, *words) == 0
    assert len(done) == 1
    assert rows_of(results / "rows.jsonl") == rows
    (out / "phi" / "4-mtl-1-12.safetensors").unlink()
    assert status(finetune.app, *words) == 2
    assert "names phi/4-mtl-1-12.safetensors, which is not in" in capsys.readouterr().err


def test_without_rows_there_is_no_result_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(finetune.app, "--results", tmp_path) == 0
    assert "no result yet" in capsys.readouterr().out


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "words", "sentence"),
    [
        (train.app, ["--methods", "mlt"], "there is no method 'mlt' here; did you mean 'mtl'?"),
        (train.app, ["--seeds", "0,a"], "seeds are '0,a'; join numbers by commas"),
        (train.app, ["--size", "big"], "size is 'big'; use native or a number of pixels"),
        (train.app, ["--rates", "mtl=0.1,1"], "rates are 'mtl=0.1,1'; write mtl=INNER with positive numbers"),
        (train.app, ["--rates", "reptile=0.1"], "write reptile=INNER,META"),
        (train.app, [], "lacks trials that choosing the rates of trajectory-shifting needs at size 32; use --tune, or"),
        (finetune.app, [], "contains no finished run"),
    ],
)
def test_a_mistake_is_one_sentence(
    app: object, words: list[str], sentence: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--device", "cpu"] if app is train.app else []
    assert status(app, data, tmp_path / "out", *device, *words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("module", [finetune, pack, train])
def test_every_command_has_a_help(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(module.app, "--help") == 0
    assert "Usage: python -m studies " in capsys.readouterr().out
