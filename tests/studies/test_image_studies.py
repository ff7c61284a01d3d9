"""The commands of the image study at toy size: they run, resume, and say what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from studies.command import run_app
from studies.images import average, conflict, native, search, tables, variants
from studies.images.catalogue import Study
from studies.images.rows import TARGETS
from studies.images.search import Search
from studies.images.variants import VARIANTS
from trajshift import load_initialization
from trajshift.recipes.build_trainer import build_trainer
from trajshift.recipes.recipe import load
from trajshift.runs import train as training

SETS = (
    "tinyimagenet_a", "tinyimagenet_b", "fashion_mnist", "gtsrb", "rsscn7", "kannada_mnist", "malaria", "clothing",
    "mnist", *TARGETS,
)  # fmt: skip
TOY = (
    "model={name: conv, options: {width: 2, depth: 1}}", "data.size=4", "data.crop_padding=1", "batch_size=2",
    "finetune.steps=1", "finetune.batch_size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve sets: ten images of two classes in each part."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(SETS):
        images = np.random.default_rng(number).integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
        labels = np.arange(10) % 2
        np.savez(folder / f"{name}.npz", x_train=images[:10], y_train=labels, x_test=images[10:], y_test=labels)
    return folder


def status(app: object, *words: str) -> int | str | None:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stopped:
        run_app(app, "studies", [*words])  # type: ignore[arg-type]
    return stopped.value.code


@pytest.fixture
def searched(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, object]]]:
    """Works on one toy study by the command; returns the rows on the targets."""

    def work(study: Study) -> list[dict[str, object]]:
        monkeypatch.setattr(search, "STUDIES", (study,))
        monkeypatch.setattr(search, "NAMES", [study.name])
        places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--processes", "1"]
        assert status(search.app, str(data), study.name, *places) == 0
        return [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]

    return work


TOY_STUDY = Study(
    name="toy", method="reptile", horizon=2, steps=4, meta_lr=1.0, order=("meta_lr",), seeds=(0,), overrides=TOY
)


def test_a_search_is_not_done_twice(
    searched: Callable[..., list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the best of three rates on mnist to the targets, at two sizes and two rates."""
    rows = searched(replace(TOY_STUDY, images=(4, 8)))
    said = capsys.readouterr().out
    tuning = [json.loads(line) for line in (tmp_path / "results" / "tuning.jsonl").read_text().splitlines()]
    tried = {row["meta_lr"] for row in tuning}
    assert 1.0 in tried
    assert len(tuning) == len(tried) * 2 * 3
    assert len(rows) == 3 * 2 * 2
    assert {row["target"] for row in rows} == set(TARGETS)
    assert len({row["meta_lr"] for row in rows}) == 1
    assert 'toy {"inner_lr": 0.02, "meta_lr": 1.0}' in said
    monkeypatch.setattr(search, "train", lambda *a, **b: pytest.fail("trained again"))
    monkeypatch.setattr(search, "evaluate_runs", lambda *a, **b: pytest.fail("fine-tuned again"))
    assert searched(replace(TOY_STUDY, images=(4, 8))) == rows


def test_a_training_that_was_stopped_resumes(
    searched: Callable[..., list[dict[str, object]]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(TOY_STUDY, order=(), every=2, images=(4,), finetune_lrs=(0.03,))
    rows = searched(study)
    assert {row["inner_steps"] for row in rows} == {2, 4}
    assert len(rows) == 2 * 3
    one = Search(study=study, data=data, results=tmp_path / "results", runs=tmp_path / "runs")
    (directory,) = (tmp_path / "runs").iterdir()
    whole = (directory / "initialization.safetensors").read_bytes()
    (directory / "initialization.safetensors").unlink()
    resumed = []
    train = training.train
    monkeypatch.setattr(search, "train", lambda *a, **b: resumed.append(b["resume"]) or train(*a, **b))
    assert one.trained({"inner_lr": 0.02, "meta_lr": 1.0}, 0) == directory
    assert resumed == [True]
    assert (directory / "initialization.safetensors").read_bytes() == whole


def test_a_study_that_diverges_ends_alone(
    searched: Callable[..., list[dict[str, object]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = replace(TOY_STUDY, inner_lr=1e30, order=(), overrides=(*TOY, "model.options.batch_norm=false"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.jsonl").touch()
    assert searched(study) == []
    assert "toy stopped: " in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_phi_and_leaves_the_trainer_as_it_was(data: Path, variant: str) -> None:
    words = [
        *TOY,
        f"data.root={data}",
        "method=trajectory-shifting",
        "horizon=20",
        "rounds=3",
        "train_on=[gtsrb,malaria]",
    ]

    def phi() -> torch.Tensor:
        trainer = build_trainer(load("small-images", words))
        for _ in trainer:
            pass
        return trainer.phi

    plain = phi()
    with VARIANTS[variant]():
        changed = phi()
    assert changed.isfinite().all()
    assert torch.equal(phi(), plain)
    assert not torch.equal(changed, plain)


def test_a_variant_is_a_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = [*TOY, f"data.root={data}", "horizon=2", "rounds=1", f"output.directory={tmp_path}", "threads=1"]
    assert status(variants.app, "heads-first", "train", "small-images", *words, "--name", "run", "--quiet") == 0
    assert (tmp_path / "run" / "initialization.safetensors").is_file()
    assert status(variants.app, "heads-frist", "train") == 2
    assert "there is no variant 'heads-frist'; did you mean 'heads-first'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two methods of one seed, two rounds of two steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for method in ("trajectory-shifting", "reptile"):
        words = [*TOY, f"data.root={data}", f"method={method}", "horizon=2", "rounds=2", "threads=1"]
        words += ["output.checkpoint_every=2", "output.keep=null", "output.tensorboard=false"]
        made.append(training.train(load("small-images", words), folder / method, quiet=True).path)
    return made


def test_native_fine_tunes_what_is_missing(
    data: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(data), *map(str, runs), "--results", str(tmp_path), "--processes", "1"]
    assert status(native.app, *words) == 0
    file = tmp_path / "native.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # from scratch and after two rounds at both rates, after one round at the first alone
    assert len(rows) == 3 * (2 * 1 + 2 * 2 + 1 * 2)
    assert {row["method"] for row in rows} == {"scratch", "trajectory-shifting", "reptile"}
    assert {row["inner_steps"] for row in rows} == {0, 2, 4}
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    done = []
    work = native.work
    monkeypatch.setattr(native, "work", lambda job: done.append(job) or work(job))
    assert status(native.app, *words) == 0
    assert len(done) == 1
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_phi_is_averaged_over_checkpoints(runs: list[Path], tmp_path: Path) -> None:
    run, out = runs[0], tmp_path / "mean.safetensors"
    assert status(average.app, str(run), str(out), "4", "4") == 0
    final, mean = load_initialization(run / "initialization.safetensors"), load_initialization(out)
    assert all(torch.equal(final[name], mean[name]) for name in final)
    assert mean.about == final.about
    assert status(average.app, str(run), str(out), "2", "4") == 0
    mean = load_initialization(out)
    assert any(not torch.equal(final[name], mean[name]) for name in final)


def test_cosines_of_the_sources(data: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    changes = [word for change in (*TOY, "horizon=2") for word in ("--set", change)]
    assert status(conflict.app, str(data), str(runs[0] / "initialization.safetensors"), *changes) == 0
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert header == ["cosine", *SETS[:8]]
    values = np.array([[float(value) for value in row[1:]] for row in rows])
    assert np.allclose(np.diag(values), 1.0, atol=0.005)
    assert np.array_equal(values, values.T)


@pytest.mark.parametrize(
    ("app", "words", "sentence"),
    [
        (tables.app, ["shiftin"], "there is no start 'shiftin'; use one of: "),
        (tables.app, ["--soon", "--horizon"], "exclude each other"),
        (tables.app, ["--leads", "a", "b"], "--leads compares four starts, A B C D, and 2 were named"),
        (tables.app, ["--targets"], "no start was named"),
        (search.app, ["/nowhere", "leap"], "there is no folder /nowhere"),
        (search.app, ["/nowhere", "lepa"], "there is no study 'lepa'; did you mean 'leap'?"),
        (native.app, ["/nowhere"], "no run was named"),
        (native.app, ["/nowhere", "/none"], "/none has no checkpoints"),
        (average.app, ["/none", "out", "3"], "/none has no checkpoint of step 3; there are: none"),
    ],
)
def test_a_mistake_is_one_sentence(
    app: object, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(app, *words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("module", [average, conflict, native, search, tables, variants])
def test_every_command_has_a_help(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(module.app, "--help") == 0  # type: ignore[attr-defined]
    assert "Usage: python -m studies " in capsys.readouterr().out


def test_an_interrupt_is_status_130(
    data: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "fine_tune", interrupt)
    assert status(native.app, str(data), str(runs[0]), "--results", str(tmp_path)) == 130
    assert capsys.readouterr().err == "stopped; rerun the same command to resume\n"
