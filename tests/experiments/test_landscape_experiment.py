"""The command `trajshift experiment landscape`, small: figures, page, findings, and a study that is cut off."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from trajshift import UsageError
from trajshift.cli.experiments import app
from trajshift.experiments.landscape import experiment, measure, tasks, updates
from trajshift.experiments.landscape.experiment import measured, run_experiment
from trajshift.experiments.landscape.findings import FAILS, HOLDS, OPEN, findings
from trajshift.experiments.landscape.measure import Limit, Settings, finish
from trajshift.experiments.landscape.study import FILE, rate, run_study
from trajshift.experiments.landscape.study_settings import StudySettings, limit_of
from trajshift.experiments.landscape.summary import compared
from trajshift.utils.processes import run_in_processes

SMALL = Settings(
    horizon=20, rounds=2, side=9, picture_side=15, starts_side=4, optima_side=7, sets=3, bias_sets=6, processes=1
)
STUDY = StudySettings(
    settings=Settings(horizon=5, rounds=2, side=5, sets=2, processes=1), tuning_seeds=(1000,), tuning_side=3, long=2
)
FIGURES = ("4a", "4b", "4c", "4d", "5ab", "5cd", "comparison")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscape")
    run_experiment(folder, settings=SMALL)
    return folder


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(experiment, "run_experiment", lambda out, study: seen.append((out, study)))
    for arguments in ([], ["--out", str(tmp_path), "--study"]):
        assert CliRunner().invoke(app, ["landscape", *arguments]).exit_code == 0
    assert seen == [(Path("runs/landscape"), False), (tmp_path, True)]


def test_every_figure_is_there_twice(out: Path) -> None:
    for name in FIGURES:
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_self_contained(out: Path) -> None:
    html = (out / "index.html").read_text()
    assert html.count("<figure>") == len(FIGURES)
    assert not re.search(r'(src|href|url\()\s*=?\s*["\']?(https?:)?//', html)
    assert "trajshift-playground" in html
    assert len(html) < 3_000_000


def test_findings_hold_the_numbers_of_the_run(out: Path) -> None:
    text = (out / "findings.md").read_text()
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["settings"]["horizon"] == 20
    assert "commit" in numbers["environment"]
    bias = numbers["short-horizon bias"]["k = 5"]
    assert f"{np.mean(bias):.3f} ± " in text
    for k in (5, 20):
        found = numbers["optima"][f"k = {k}"]
        assert f"{found['points']} points in {found['clusters']} clusters at k = {k}" in text
    assert "Published set, from a 9 x 9 grid: " in text
    assert "Random sets, each from a 7 x 7 grid: " in text
    quality = numbers["quality at equal meta-updates"]["mean"]["reptile"]
    assert f"| reptile | 40 | 800 | {np.mean(list(quality.values())):.3f} ± " in text


def test_arrays_hold_what_the_figures_show(out: Path) -> None:
    with np.load(out / "arrays.npz") as arrays:
        assert arrays["phi_reptile"].shape == (41, 5, 2)
        assert arrays["inner_steps_accurate"][-1] == 2 * 20 * 21 / 2
        assert arrays["quality_inner-steps_leap"].shape == (3, 16)
        assert arrays["bias"].shape == (6, 21)


def test_verdicts_follow_from_the_numbers() -> None:
    results = measured(SMALL)
    worse = torch.linspace(5.0, 1.0, 21).expand(6, 21) + 0.01 * torch.arange(6)[:, None] * torch.linspace(1.0, 0.0, 21)
    for bias, verdict in ((worse, HOLDS), (worse.flip(1), FAILS), (torch.ones(6, 21), OPEN)):
        object.__setattr__(results, "bias", bias)
        assert findings(results).claims[0].verdict == verdict


def test_an_overflow_counts_as_the_worst_of_the_domain() -> None:
    quality = {m: np.array([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0]]) for m in measure.METHODS}
    quality["reptile"] = np.array([[np.nan, 0.1, 2.0], [1.0, 2.0, 3.0]])
    found = compared(quality, np.array([[0.5, 0.5], [8.0, 8.0]]))
    assert found.mean["leap"] == {0: pytest.approx(11 / 3), 1: 2.0}  # 9 counts as the domain's worst, 8
    assert found.mean["reptile"] == {0: pytest.approx(10.1 / 3), 1: 2.0}
    assert found.median["reptile"] == {0: 2.0, 1: 2.0}
    assert found.good["reptile"] == pytest.approx({0: 100 / 3, 1: 0.0})
    assert found.tests("mean")["trajectory-shifting", "no-shifting"].p_holm == 1.0


def test_a_run_ends_at_the_last_update_within_the_budget() -> None:
    starts, sets = torch.tensor([[0.0, 10.0]], dtype=torch.float64), measure.random_sets([0])
    settings = Settings(horizon=4, rounds=2)
    end = finish("accurate", sets, starts, Limit("inner steps", 8), settings)
    assert (end.updates, end.inner_steps) == (2, 5)
    phi = [one.phi for one in updates("accurate", starts, tasks=tasks(seed=0), horizon=4, rounds=1)]
    torch.testing.assert_close(end.phi[0], phi[2])
    end = finish("reptile", sets, starts, Limit("meta-updates", 3), settings)
    assert (end.updates, end.inner_steps) == (3, 12)


def test_two_processes_give_what_one_does() -> None:
    jobs = {(seed,): _threshold for seed in range(3)}
    assert list(run_in_processes(jobs, 2)) == list(run_in_processes(jobs, 1))


def _threshold() -> list[list[float]]:
    return measure.yardsticks([0], SMALL).tolist()


# -- the study -------------------------------------------------------------------------------------------------------


def test_budgets_are_counted_in_meta_updates_where_that_is_exact() -> None:
    limit = Limit("inner steps", 300)
    assert limit_of("reptile", limit, Settings()) == Limit("meta-updates", 3)
    assert limit_of("no-shifting", limit, Settings()) == Limit("meta-updates", 300)
    assert limit_of("accurate", limit, Settings()) == limit
    assert [rate(third) for third in (-3, -2, -1, 0, 1)] == [0.1, 0.22, 0.46, 1.0, 2.2]


def test_a_study_cut_off_at_any_row_ends_with_the_same_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_study(whole, study=STUDY)
    rows = (whole / FILE).read_bytes().splitlines(keepends=True)
    assert len(rows) == 1 + 3 * sum(b'"tuning"' in row for row in rows)
    report = (whole / "study.md").read_text()
    assert "## 10 meta-updates" in report
    assert "## 20 inner steps" in report
    for name in ("study.svg", "study.png", "study.json"):
        assert (whole / name).is_file()
    for kept in (1, len(rows) // 2):
        cut = tmp_path / f"cut-{kept}"
        cut.mkdir()
        (cut / FILE).write_bytes(b"".join(rows[:kept]) + rows[kept][:17])  # and half a row
        run_study(cut, study=STUDY)
        assert (cut / FILE).read_bytes() == b"".join(rows)
        assert (cut / "study.md").read_text() == report
    with pytest.raises(UsageError, match="is from a study with other settings; delete it, or name another folder"):
        run_study(whole, study=replace(STUDY, long=3))
    check_damage(whole, rows, report)


def check_damage(whole: Path, rows: list[bytes], report: str) -> None:
    """A damaged row is measured again, but without the settings nothing can be trusted."""
    (whole / FILE).write_bytes(b"".join([rows[0], rows[1][:-9] + b"\n", b"7\n", *rows[3:]]))
    run_study(whole, study=STUDY)
    assert (whole / FILE).read_bytes().endswith(b"".join([*rows[3:], *rows[1:3]]))
    assert (whole / "study.md").read_text() == report
    (whole / FILE).write_bytes(b"{}\n" + b"".join(rows[1:]))
    with pytest.raises(UsageError, match="has no readable row of settings; delete it, or name another folder"):
        run_study(whole, study=STUDY)


def test_where_nothing_can_be_written_is_named() -> None:
    with pytest.raises(UsageError, match=r"cannot write to /proc/x: .*; choose another --out"):
        run_experiment(Path("/proc/x"), settings=SMALL)
