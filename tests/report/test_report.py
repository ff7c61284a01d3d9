"""The page: from saved files only, complete, self-contained, the same bytes twice, and honest about what is missing."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import summary_table
from trajshift.evaluation.evaluation_row import FINAL, SCRATCH, EvaluationRow
from trajshift.recipes.recipe import load, to_yaml
from trajshift.report.figures import aligned, looks
from trajshift.report.result_sections import verdict
from trajshift.report.write_report import write_report
from trajshift.runs.collect_rows import collect
from trajshift.utils.files import append_row, read_jsonl

METHODS = {"trajectory-shifting": 0.74, "reptile": 0.70, "no-shifting": 0.699}
TARGETS = {"six-to-nine": 0.05, "digit-and-turn": 0.0, "digit-and-side": -0.06}
STEPS = (100, 200, 300, 400)


RECIPE = """
horizon: 50
rounds: 8
tasks:
  upright: {source: "digits:upright"}
  parity: {source: "digits:parity"}
targets:
  six-to-nine: {source: "digits:six-to-nine"}
"""


def make_run(
    folder: Path, method: str, seed: int, *, checkpoints: bool = True, sizes: tuple[int | None, ...] = (None, 20, 5)
) -> Path:
    """A run directory as training and evaluation leave it, with made-up numbers."""
    rng = np.random.default_rng([seed, len(method)])
    folder.mkdir(exist_ok=True)
    file = folder / "recipe-of-tests.yaml"
    file.write_text(RECIPE)
    recipe = load(file, [f"method={method}", f"seed={seed}", f"output.name={method}-{seed}"])
    path = folder / f"{method}-{seed}"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(to_yaml(recipe))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}, "cores": 2}))
    (path / "choices.json").write_text(json.dumps({"meta_lr": 0.2, "meta_every": 1, "tasks": []}))
    tasks = list(recipe.source_tasks())
    for step in range(10, 401, 10):
        values = {t: {"loss": 2 * np.exp(-step / 150) + 0.1 * rng.normal(), "distance": step % 50 / 50} for t in tasks}
        counts = {
            "step": step,
            "inner_steps": step,
            "gradient_evaluations": 8 * step,
            "round": step // 50,
            "k": step % 50,
        }
        append_row(path / "metrics.jsonl", counts | {"meta_update_norm": 1 / step, "tasks": values})
        append_row(path / "timing.jsonl", {"step": step, "seconds": step / 10, "steps_per_second": 10.0})
    scratch = ["scratch"] if method == "reptile" else []
    for checkpoint in [*(STEPS[:-1] if checkpoints else ()), "initialization", *scratch]:
        for target, offset in TARGETS.items():
            for size in sizes if isinstance(checkpoint, str) else (None,):
                done = 0 if checkpoint == "scratch" else checkpoint if isinstance(checkpoint, int) else STEPS[-1]
                accuracy = (0.55 if checkpoint == "scratch" else METHODS[method]) + offset
                accuracy += 0.02 * rng.normal() - 0.2 * np.exp(-(size or 80) / 20) - 0.1 * (1 - done / STEPS[-1])
                append_row(
                    path / "evaluation.jsonl",
                    {
                        "checkpoint": checkpoint, "inner_steps": done, "method": method, "label": method, "seed": seed,
                        "section": "targets", "phi": None, "setting": target, "target": target, "train_images": size,
                        "images": size or 80, "steps": 60, "accuracy": float(accuracy), "loss": float(1 - accuracy),
                    },
                )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder, method, seed) for method in METHODS for seed in range(3)]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert write_report(runs, out) == out
    return out


class Reader(HTMLParser):
    """Collects text, tags and addresses; unbalanced tags fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: Path) -> tuple[Reader, str]:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader, " ".join(" ".join(reader.text).split())


def test_many_runs(runs: list[Path], page: Path) -> None:
    reader, text = read(page)
    names = ["comparison", "inner_steps", "few_data", "training_loss", "training_distance", "meta_update"]
    names += ["gain_over_scratch"]
    assert reader.tags.count("figure") == len(names)
    saved = {path.name for path in (page.parent / "page-figures").iterdir()}
    sizes = [f"{name}{suffix}" for name in ("comparison", "tests") for suffix in ("", "-2", "-3")]
    assert saved == {
        *(f"{name}.{kind}" for name in names for kind in ("svg", "png")),
        *(f"{name}.{kind}" for name in [*sizes, *names[1:5], names[-1], "reach"] for kind in ("csv", "md")),
    }
    summary = summary_table(collect(runs)[0])
    for cell in [cell for row in [*summary.cells(), *summary.test_cells()] for cell in row]:
        assert cell in text
    for part in [*METHODS, *TARGETS, "scratch", "parity", "3 seeds (0, 1, 2)", "3,200", "40 s", "torch 2.13"]:
        assert part in text
    assert verdict(summary) in text


def numbers(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_are_saved_as_numbers_and_as_text(runs: list[Path], page: Path) -> None:
    folder = page.parent / "page-figures"
    summary = summary_table(collect(runs)[0])
    saved = {(row["method"], row["target"]): row for row in numbers(folder / "comparison.csv")}
    for line in summary.lines:
        assert line.average is not None
        row = saved[line.label, "average of targets"]
        assert float(row["mean_accuracy"]) == pytest.approx(line.average.mean)
        assert float(row["half_width"]) == pytest.approx(line.average.half_width)
        assert int(row["seeds"]) == 3
    text = (folder / "comparison.md").read_text()
    assert all(f"| {' | '.join(row)} |" in text for row in summary.cells())
    tests = numbers(folder / "tests.csv")
    assert [row["first"] for row in tests] == [test.first for test in summary.tests]
    assert [float(row["p_holm"]) for row in tests] == pytest.approx([test.p_holm for test in summary.tests])
    steps = numbers(folder / "inner_steps.csv")
    assert {int(row["inner_steps"]) for row in steps if row["method"] == "reptile"} == set(STEPS)
    few = numbers(folder / "few_data.csv")
    assert {row["train_images"] for row in few if row["target"] == "average of targets"} == {"5", "20"}
    text = (folder / "few_data.md").read_text()
    assert "| target | method | 5 | 20 |" in text
    first = next(row for row in few if row["target"] == "average of targets" and row["train_images"] == "5")
    loss = [
        row for row in numbers(folder / "training_loss.csv") if (row["method"], row["task"]) == ("reptile", "parity")
    ]
    logged = [read_jsonl(run / "metrics.jsonl") for run in runs if run.name.startswith("reptile")]
    of_seed = [[row["tasks"]["parity"]["loss"] for row in rows] for rows in logged]
    assert [float(row["inner_steps"]) for row in loss] == [row["inner_steps"] for row in logged[0]]
    assert [float(row["mean_loss"]) for row in loss] == pytest.approx(np.mean(of_seed, 0))
    assert [float(row["most"]) for row in loss] == pytest.approx(np.max(of_seed, 0))
    tenth = f"{np.mean(of_seed, 0)[:4].mean():.4f}"  # 40 rows in ten parts
    assert f"| parity | reptile | {tenth} |" in (folder / "training_loss.md").read_text()
    cell = f"{100 * float(first['mean_accuracy']):.2f} \u00b1 {100 * float(first['half_width']):.2f}"
    assert f"| average of targets | {first['method']} | {cell} |" in text
    assert (folder / "inner_steps.md").is_file()


@pytest.mark.usefixtures("undrawn")
def test_gains_are_paired_with_the_start_of_the_same_seed(tmp_path: Path) -> None:
    path = make_run(tmp_path, "reptile", 0)
    write_report([path])
    rows = collect([path])[0]
    value = {(row.label, row.target, row.train_images, row.start): row.metrics["accuracy"] for row in rows}
    for row in numbers(path / "report-figures" / "gain_over_scratch.csv"):
        if row["target"] in TARGETS and row["train_images"] != "80":
            target, size = row["target"], int(row["train_images"])
            gain = value["reptile", target, size, FINAL] - value["scratch", target, size, SCRATCH]
            assert float(row["mean_accuracy"]) == pytest.approx(gain)


def test_the_page_is_self_contained(page: Path) -> None:
    reader, _ = read(page)
    assert all(address.startswith("#") for address in reader.addresses)
    html = page.read_text(encoding="utf-8")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)


def test_the_same_files_give_the_same_bytes(runs: list[Path], page: Path, tmp_path: Path) -> None:
    again = write_report([*runs, runs[0]], tmp_path)
    assert again == tmp_path / "report.html"
    assert again.read_bytes() == page.read_bytes()
    for figure in (page.parent / "page-figures").iterdir():
        assert figure.read_bytes() == (tmp_path / "report-figures" / figure.name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_one_run_with_one_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0, checkpoints=False, sizes=(None,))
    page = write_report([run])
    assert page == run / "report.html"
    reader, text = read(page)
    assert "one seed gives neither an interval nor a test" in text.lower()
    assert "Only the end of meta-training was evaluated" in text
    assert "Few data" not in text
    assert reader.tags.count("figure") == 4


@pytest.mark.usefixtures("undrawn")
def test_runs_without_evaluation_or_metrics_say_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0)
    (run / "evaluation.jsonl").unlink()
    _, text = read(write_report([run]))
    assert "Figure 1. Training loss" in text
    assert "have not been evaluated yet: trajshift evaluate" in text
    for name in ("metrics.jsonl", "timing.jsonl", "environment.json", "choices.json"):
        (run / name).unlink()
    reader, text = read(write_report([run]))
    assert "Nothing was logged yet" in text
    assert "No environment.json" in text
    assert "figure" not in reader.tags


@pytest.mark.usefixtures("undrawn")
def test_half_written_rows_are_tolerated(tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0, checkpoints=False, sizes=(None,))
    before = write_report([run]).read_bytes()
    for name in ("metrics.jsonl", "evaluation.jsonl", "timing.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 410, "inn')
    assert write_report([run]).read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_runs_that_do_not_count_are_named(tmp_path: Path) -> None:
    whole, half, bare = (make_run(tmp_path, "reptile", seed) for seed in range(3))
    rows = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(rows[:20]))
    (half / "evaluation.jsonl").unlink()
    (bare / "evaluation.jsonl").unlink()
    (whole / "metrics.jsonl").unlink()  # only the recipe must be there
    _, text = read(write_report([whole, half, bare], notes=["A word of the caller."]))
    assert "reptile-1 is not finished: 200 of 400 inner steps" in text
    assert "reptile-2 is not in the tables" in text
    assert "A word of the caller." in text
    assert "reptile-0 is" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_page_may_show_some_sizes_alone(runs: list[Path], tmp_path: Path) -> None:
    _, text = read(write_report(runs, tmp_path, train_images=[20]))
    assert "20 training images" in text
    assert "5 training images" not in text.replace("25 training", "")
    assert not (tmp_path / "report-figures" / "few_data.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_methods_that_the_first_table_lacks_are_named(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, "reptile", 0, sizes=(None,)), make_run(tmp_path, "no-shifting", 0, sizes=(20,))]
    (paths[1] / "evaluation.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n" for row in read_jsonl(paths[1] / "evaluation.jsonl") if row["train_images"] == 20
        )
    )
    assert "not in the first table: no-shifting." in read(write_report(paths))[1]
    assert "not in the first table" not in read(write_report(paths[:1]))[1]


@pytest.mark.usefixtures("undrawn")
def test_the_horizon_is_an_axis(tmp_path: Path) -> None:
    paths = []
    for horizon, gain in ((50, 0.0), (100, 0.1)):
        for seed in (0, 1):
            path = make_run(tmp_path / str(horizon), "reptile", seed, checkpoints=False, sizes=(None,))
            recipe = load(path, [f"horizon={horizon}", f"rounds={400 // horizon}"])
            (path / "recipe.yaml").write_text(to_yaml(recipe))
            saved = read_jsonl(path / "evaluation.jsonl")
            (path / "evaluation.jsonl").unlink()
            for row in saved:
                append_row(path / "evaluation.jsonl", row | {"accuracy": row["accuracy"] + gain})
            paths.append(path)
    folder = write_report(paths, tmp_path).parent / "report-figures"
    average = [row for row in numbers(folder / "horizon.csv") if row["target"] == "average of targets"]
    assert [(row["method"], row["horizon"], row["seeds"]) for row in average] == [
        ("reptile", "50", "2"), ("reptile", "100", "2")
    ]  # fmt: skip
    low, high = (float(row["mean_accuracy"]) for row in average)
    assert high - low == pytest.approx(0.1)
    assert (folder / "horizon.svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_only_like_fine_tunings_lie_on_one_curve(tmp_path: Path) -> None:
    """The ends were fine-tuned again in another way, the checkpoints were not."""
    path = make_run(tmp_path, "reptile", 0, sizes=(None,))
    for row in read_jsonl(path / "evaluation.jsonl"):
        if row["checkpoint"] == "initialization":
            append_row(path / "evaluation.jsonl", row | {"setting": "other", "accuracy": row["accuracy"] + 0.2})
    text = read(write_report([path]))[1]
    assert "Only the end of meta-training was evaluated" in text
    assert not (path / "report-figures" / "inner_steps.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_gain_without_its_start_is_no_gain(tmp_path: Path) -> None:
    path = make_run(tmp_path, "reptile", 0)
    for row in read_jsonl(path / "evaluation.jsonl"):
        if row["checkpoint"] == "scratch" and row["train_images"] == 5:
            failed = {key: value for key, value in row.items() if key not in ("accuracy", "loss")}
            append_row(path / "evaluation.jsonl", failed | {"error": "the loss at step 3 is nan"})
    write_report([path])
    rows = numbers(path / "report-figures" / "gain_over_scratch.csv")
    assert {row["train_images"] for row in rows if row["target"] in TARGETS} == {"20", "80"}


def test_texts_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        (run / name).unlink()
    (run / "environment.json").write_text(json.dumps({"processor": "<script>alert(1)</script> & co"}))
    reader, text = read(write_report([run]))
    assert "script" not in reader.tags
    assert "<script>alert(1)</script> & co" in text


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory was given"):
        write_report([])
    with pytest.raises(UsageError, match=r"without recipe\.yaml"):
        write_report([tmp_path])
    run = make_run(tmp_path, "reptile", 0)
    (run / "environment.json").write_text("{")
    with pytest.raises(UsageError, match=r"environment\.json is damaged"):
        write_report([run])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_of_the_extra_it_is_named(package: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0)
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from trajshift.errors import UsageError\nfrom trajshift.report.write_report import write_report\n"
        f"try: write_report([{str(run)!r}])\nexcept UsageError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == f"intervals, figures and pages need {package}: pip install 'trajshift[report]'\n"


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path, "reptile", 0, checkpoints=False, sizes=(None,))
    code = f"import sys\nfrom trajshift.report.write_report import write_report\nwrite_report([{str(run)!r}])\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- parts ---------------------------------------------------------------------------------------------------------


def made(values: dict[str, list[float]]) -> list[EvaluationRow]:
    base = {
        "checkpoint": "initialization",
        "inner_steps": 9,
        "target": "t",
        "train_images": None,
        "steps": 1,
        "setting": "s",
    }
    return [
        EvaluationRow.from_json(
            base | {"label": label, "method": label, "seed": seed, "accuracy": value, "loss": 1 - value}
        )
        for label, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def test_verdict_claims_no_more_than_the_tests_do() -> None:
    near = verdict(summary_table(made({"a": [0.50, 0.60, 0.70], "b": [0.52, 0.57, 0.69]})))
    assert near.startswith("Best on average is a with 60.00")
    assert "cannot be told apart from b (p = 0." in near
    far = verdict(summary_table(made({"a": [0.50, 0.60, 0.70], "b": [0.30, 0.401, 0.502]})))
    assert "it differs from b (p = " in far
    assert "too few seeds" in verdict(summary_table(made({"a": [0.5], "b": [0.6]})))
    assert verdict(summary_table(made({"a": [0.5]}))) == "a: 50.00 % test accuracy on average over the targets."


def test_long_series_are_averaged_in_bins_that_keep_the_mean() -> None:
    x = np.arange(1, 3001)
    y = np.sin(x / 100)
    places, values = aligned([(x, y), (x, y + 1)])
    assert values.shape == (2, 150)
    assert places[0] == pytest.approx(10.0)
    assert values.mean(1) == pytest.approx([y.mean(), y.mean() + 1])
    short, same = aligned([([1, 2], [3, 4])])
    assert short.tolist() == [1, 2]
    assert same.tolist() == [[3, 4]]


def test_a_method_keeps_its_looks_and_no_two_share_them() -> None:
    styles = looks([f"method {index}" for index in range(20)] + ["scratch"])
    assert len({tuple(style.items()) for style in styles.values()}) == 22


def test_what_an_earlier_page_had_is_dropped(tmp_path: Path, undrawn: None) -> None:
    """After a resume a page without results stood beside the tables of the one before; a user's file stays."""
    run = make_run(tmp_path, "reptile", 0)
    folder = write_report([run]).parent / "report-figures"
    assert (folder / "comparison.csv").exists()
    (folder / "notes.csv").write_text("mine")
    (run / "evaluation.jsonl").unlink()
    write_report([run])
    left = {file.name for file in folder.iterdir()}
    assert {"notes.csv", "training_loss.csv"} <= left
    assert not any(name.startswith(("comparison", "tests", "few_data")) for name in left)
