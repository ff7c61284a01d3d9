from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trajshift.cli.main import main
from trajshift.evaluation.finetuning import FineTuned
from trajshift.experiments.demo import demo_jobs
from trajshift.recipes.recipe import load
from trajshift.runs.directory import RunDirectory
from trajshift.training import checkpoint
from trajshift.utils.files import read_jsonl as read_rows
from trajshift.utils.progress import Progress, duration

TINY = """
threads: 1
method: trajectory-shifting
horizon: 4
rounds: 3
batch_size: 8
model: {name: conv, options: {width: 4, depth: 1}}
tasks:
  mirrored: {source: "digits:mirrored"}
  few: {source: "digits:few-classes"}
tuning:
  side: {source: "digits:digit-and-side"}
targets:
  six: {source: "digits:six-to-nine"}
finetune: {steps: 2, batch_size: 8}
output: {log_every: 3, checkpoint_every: 5, tensorboard: false}
"""
STEPS = 12

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def trajshift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trajshift", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            status = 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def files(path: Path, *leave_out: str) -> dict[str, bytes]:
    """The bytes of all files below a folder, by relative name."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: content for name, content in found.items() if name not in leave_out}


@pytest.mark.parametrize("name", ["small-images", "recommended"])
def test_recipes_on_files_run(name: str, folder: Path, trajshift: Command) -> None:
    """Every other shipped recipe runs in the tests of the demo and of the published experiments."""
    recipe = load(name)
    draw = np.random.default_rng(0)
    for task in (*recipe.tasks.values(), *recipe.tuning.values(), *recipe.targets.values()):
        images, labels = draw.integers(0, 256, (12, 20, 20, 3), dtype=np.uint8), np.arange(12) % 4
        np.savez(folder / task.source.partition(":")[2], x_train=images, y_train=labels, x_test=images, y_test=labels)
    short = ("horizon=4", "rounds=2", "batch_size=4", "threads=1", "output.name=short", "output.tensorboard=false")
    tiny = ("finetune.steps=2", "finetune.batch_size=4")
    assert trajshift("train", name, *short, *tiny, "--quiet")[0] == 0
    status, shown, _ = trajshift("evaluate", "--scratch", "--threads", "1", "runs/short")
    assert status == 0
    rows = read_rows(folder / "runs" / "short" / "evaluation.jsonl")
    assert {(row["target"], row["checkpoint"]) for row in rows} == {
        (target, start) for target in recipe.targets for start in ("initialization", "scratch")
    }
    assert recipe.method in shown


CLOCKS = ("timing.jsonl", "environment.json", "recipe.yaml", "demo.log")


# what must not need torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["methods"], 0),
        (["experiment", "landscape", "--help"], 0),
        (["experiment", "approximation-error", "--help"], 0),
        (["data", "--help"], 0),
        (["data", "list"], 0),
        (["data", "prepare", "cifar"], 2),
        (["train", "digits", "--print-config"], 0),
        (["train", "digits", "method=reptil"], 2),
        (["sweep", "digits", "meta_lr=1"], 2),
    ],
)
def test_no_torch_is_imported(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from trajshift.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: status = end.code or 0\n"
        "else: status = 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        f"assert status == {status}, status"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "trajshift", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("trajshift ")


def test_methods_lists_all_with_references(trajshift: Command) -> None:
    _, out, _ = trajshift("methods")
    for name in ("trajectory-shifting", "accurate", "fomaml++", "imaml", "single-task"):
        assert name in out
    assert "ICML 2021" in out


# train ------------------------------------------------------------------------------------------------------


def test_print_config_is_a_recipe(trajshift: Command, folder: Path) -> None:
    status, out, _ = trajshift("train", "tiny.yaml", "meta_lr=1e-2", "--print-config")
    assert status == 0
    (folder / "printed.yaml").write_text(out)
    assert load(folder / "printed.yaml") == load("tiny.yaml", ["meta_lr=0.01"])
    assert not (folder / "runs").exists()


def test_train_writes_the_run_directory(trajshift: Command, folder: Path) -> None:
    status, out, err = trajshift("train", "tiny.yaml", "--name", "one")
    assert status == 0, err
    run = folder / "runs" / "one"
    assert "12 inner steps per task done" in out
    assert "meta_lr 1" in err
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert rows[-1]["gradient_evaluations"] == 2 * STEPS
    assert set(rows[-1]["tasks"]) == {"mirrored", "few"}
    assert set(rows[-1]["tasks"]["few"]) == {"loss", "distance"}
    assert [row["step"] for row in read_rows(run / "timing.jsonl")] == [3, 6, 9, 12]
    assert "seconds" not in (run / "metrics.jsonl").read_text()
    assert checkpoint.steps(run / "checkpoints") == [5, 10, 12]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["threads"] == 1
    assert json.loads((run / "choices.json").read_text())["meta_lr"] == 1.0
    assert RunDirectory(run).initialization_step() == STEPS
    assert str(folder) not in (run / "initialization.safetensors").read_bytes().decode("latin-1")


def test_the_same_recipe_gives_the_same_bytes_anywhere(trajshift: Command, folder: Path) -> None:
    for name in ("one", "two"):
        assert trajshift("train", "tiny.yaml", "--name", name, "--quiet")[0] == 0
    one, two = (files(folder / "runs" / name, *CLOCKS) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_gives_the_same_bytes(
    trajshift: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    trajshift("train", "tiny.yaml", "--name", "whole", "--quiet")
    update = Progress.update

    def interrupting(self: Progress, step: int, *rest: object) -> None:
        if step == 7:
            os.kill(os.getpid(), number)
        update(self, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupting)
        status, _, err = trajshift("train", "tiny.yaml", "--name", "cut")
    assert status == 128 + number
    assert "stopped at step 8" in err
    assert "trajshift train --resume runs/cut" in err
    run = folder / "runs" / "cut"
    assert checkpoint.steps(run / "checkpoints") == [5, 8]
    with open(run / "metrics.jsonl", "a") as file:  # as a crash after the checkpoint leaves it
        file.write('{"step": 9, "tasks": {}}\n{"step": 1')
    status, _, err = trajshift("train", "--resume", "runs/cut")
    assert status == 0, err
    assert "from step 8" in err
    whole = folder / "runs" / "whole"
    for name in ("metrics.jsonl", "initialization.safetensors", "choices.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for step in (10, 12):
        place = f"checkpoints/{step:09d}"
        assert files(run / place) == files(whole / place)
    assert [row["step"] for row in read_rows(run / "timing.jsonl")] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "tiny.yaml", "meta_lr=0.1,0.2"], "trajshift: interrupted; rerun the same command to resume\n"),
        (["report", "runs/any"], "trajshift: interrupted\n"),
    ],
)
def test_an_interrupt_is_said_in_one_sentence(
    trajshift: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trajshift.runs.sweep.run_sweep", interrupted)
    monkeypatch.setattr("trajshift.cli.commands.report", interrupted)
    assert trajshift(*words) == (128 + signal.SIGINT, "", said)


def test_resume_of_a_complete_run_changes_nothing(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    before = files(folder / "runs" / "one", "environment.json")
    assert trajshift("train", "tiny.yaml", "--name", "one", "--resume", "--quiet")[0] == 0
    assert files(folder / "runs" / "one", "environment.json") == before


def test_more_rounds_and_other_tasks_at_a_boundary(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    status, _, err = trajshift("train", "--resume", "runs/one", "tasks.few=null", "--quiet")
    assert status == 2
    assert "raise rounds" in err
    more = ("rounds=4", "tasks.few=null", "tasks.turned.source=digits:turned")
    status, _, err = trajshift("train", "--resume", "runs/one", *more, "--quiet")
    assert status == 0, err
    rows = read_rows(folder / "runs" / "one" / "metrics.jsonl")
    assert set(rows[-1]["tasks"]) == {"mirrored", "turned"}
    assert rows[-1]["step"] == 16


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    run = folder / "runs" / "one"
    before = files(run, *CLOCKS)
    shared = run / "checkpoints" / "000000012" / "shared.safetensors"
    shared.write_bytes(shared.read_bytes()[:-1] + b"?")
    status, _, err = trajshift("train", "--resume", "runs/one")
    assert status == 0
    assert "000000012 is damaged" in err
    assert "from step 10" in err
    assert files(run, *CLOCKS) == before


# every bad input is one sentence and exit status 2 ----------------------------------------------------------


def write_npz(path: Path, **changes: np.ndarray) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "x_train": draw.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": draw.integers(0, 255, (8, 8, 8, 1), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    np.savez(path, **{**arrays, **changes})


MISTAKES = {
    "unknown method": (["method=reptil"], ["reptil", "did you mean 'reptile'"]),
    "unknown task": (["tasks.mirored.flip=false"], ["mirored", "did you mean 'mirrored'"]),
    "unknown field": (["inner.rate=1"], ["unknown field 'rate' in inner"]),
    "unknown digits": (["tasks.a.source=digits:mirored"], ["mirored", "did you mean 'mirrored'"]),
    "unknown model": (["model.name=resnet21"], ["resnet21", "did you mean 'resnet"]),
    "unknown model option": (["model.options.widht=3"], ["widht", "did you mean 'width'"]),
    "unknown optimizer": (["inner.optimizer=sgdd"], ["sgdd", "did you mean 'sgd'"]),
    "unknown optimizer option": (["inner.options.momentu=1"], ["momentu"]),
    "unknown source option": (["tasks.mirrored.options.a=1"], ["mirrored", "take no options", "'a'"]),
    "missing file": (["tasks.a.source=npz:missing.npz"], ["missing.npz", "no such file"]),
    "malformed file": (["tasks.a.source=npz:tiny.yaml"], ["tiny.yaml", "not a readable .npz"]),
    "missing array": (["tasks.a.source=npz:half.npz"], ["half.npz", "'x_test' is missing"]),
    "labels out of range": (["tasks.a.source=npz:labels.npz"], ["labels.npz", "labels", "0 to 3"]),
    "empty split": (["tasks.a.source=npz:empty.npz"], ["empty.npz", "_train is empty"]),
    "no examples left to train on": (
        ["tasks.a.source=npz:single.npz", "method=imaml"],
        ["'a' has 1 training examples", "heldout"],
    ),
    "images that do not fit": (
        ["tasks.mirrored.channels=3", "tasks.few=null", "model.name=own:wants_grey", "model.options={}"],
        ["task 'mirrored'", "do not fit model 'own:wants_grey'"],
    ),
    "horizon": (["horizon=0"], ["horizon is 0"]),
    "meta_every that does not divide": (["meta_every=3"], ["meta_every is 3", "does not divide"]),
    "meta_every above the horizon": (["meta_every=8"], ["meta_every is 8", "from 1 to the horizon"]),
    "meta_lr for joint training": (["method=mtl", "meta_lr=1"], ["mtl", "meta_lr"]),
    "tasks_per_round": (["tasks_per_round=3"], ["tasks_per_round is 3"]),
    "initialization that is not there": (["initialization=none.safetensors"], ["none.safetensors"]),
    "no such device": (["device=gpu"], ["device 'gpu'"]),
    "source that returns no task": (["tasks.a.source=own:nothing"], ["own:nothing", "returned a NoneType"]),
    "source that is not there": (["tasks.a.source=own:nothin"], ["'own' has no 'nothin'"]),
    "loss that is not finite": (["inner.lr=1e30"], ["not finite", "step", "1e+30"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(trajshift: Command, folder: Path, case: str) -> None:
    overrides, words = MISTAKES[case]
    write_npz(folder / "labels.npz", y_test=np.arange(8) + 2)
    write_npz(folder / "empty.npz", x_train=np.zeros((0, 8, 8, 1), np.uint8), y_train=np.zeros(0, np.int64))
    write_npz(folder / "single.npz", x_train=np.zeros((1, 8, 8, 1), np.uint8), y_train=np.zeros(1, np.int64),
              y_test=np.zeros(8, np.int64), class_names=np.array(list("abcd")))  # fmt: skip
    np.savez(folder / "half.npz", x_train=np.zeros((1, 8, 8), np.uint8), y_train=np.zeros(1, np.int64))
    (folder / "own.py").write_text(
        "from torch import nn\n"
        "def nothing(name): pass\n"
        "def wants_grey(task):\n"
        "    m = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())\n"
        "    m.add_module('fc', nn.Linear(72, task.outputs))\n"
        "    return m\n"
    )
    status, out, err = trajshift("train", "tiny.yaml", "--quiet", *overrides)
    assert status == 2, err
    assert err.startswith("trajshift: ")
    assert err.count("\n") == 1
    assert out == ""
    for word in words:
        assert word in err
    sys.modules.pop("own", None)


def test_a_run_is_not_overwritten(trajshift: Command) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    status, _, err = trajshift("train", "tiny.yaml", "--name", "one")
    assert status == 2
    assert "already contains a run" in err
    status, _, err = trajshift("train", "runs/one")
    assert status == 2
    assert "--resume" in err


def test_a_start_that_failed_may_be_repeated(trajshift: Command) -> None:
    assert trajshift("train", "tiny.yaml", "--name", "one", "inner.lr=1e30", "--quiet")[0] == 2
    assert trajshift("train", "tiny.yaml", "--name", "one", "--quiet")[0] == 0


def test_another_recipe_does_not_resume(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    status, _, err = trajshift("train", "tiny.yaml", "--name", "one", "--resume", "inner.lr=0.5", "seed=3")
    assert status == 2
    assert "inner.lr was 0.01 and is now 0.5" in err or "seed was 0 and is now 3" in err
    assert "inner.lr" in err
    assert "seed" in err
    trajshift("train", "tiny.yaml", "--name", "two", "seed=1", "--quiet")
    shutil.rmtree(folder / "runs/one/checkpoints")
    shutil.copytree(folder / "runs/two/checkpoints", folder / "runs/one/checkpoints")
    status, _, err = trajshift("train", "--resume", "runs/one")
    assert status == 2
    assert "was written by another recipe" in err


def test_tasks_do_not_change_inside_a_round(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    shutil.rmtree(folder / "runs/one/checkpoints/000000012")
    status, _, err = trajshift("train", "--resume", "runs/one", "tasks.few.weight=2")
    assert status == 2
    assert "tasks.few.weight may change only between rounds" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(trajshift: Command, folder: Path) -> None:
    (folder / "runs/one").mkdir(parents=True)
    (folder / "runs/one/metrics.jsonl").symlink_to("/dev/full")
    status, _, err = trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    assert status == 2
    assert "no space left on the disk of runs/one" in err
    assert err.count("\n") == 1


def test_a_run_is_trained_by_one_process_at_a_time(trajshift: Command, folder: Path) -> None:
    other = RunDirectory(folder / "runs/one")
    other.lock()
    status, _, err = trajshift("train", "tiny.yaml", "--name", "one")
    other.unlock()
    assert status == 2
    assert "another process" in err


def test_the_last_good_checkpoint_is_kept_when_the_loss_explodes(trajshift: Command, folder: Path) -> None:
    explode = ("inner.lr=50", "inner.options={}", "rounds=100", "output.checkpoint_every=1", "output.log_every=1")
    status, _, err = trajshift(
        "train", "tiny.yaml", "--name", "one", "--quiet", *explode, "model.options.batch_norm=false"
    )
    assert status == 2
    kept = checkpoint.steps(folder / "runs/one/checkpoints")
    assert f"the last good checkpoint, step {kept[-1]}, is kept" in err
    assert not RunDirectory(folder / "runs/one").initialization.exists()


# after training ---------------------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_said_before_fine_tuning(
    trajshift: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[FineTuned.__module__], "finetune", None)
        status, _, err = trajshift("finetune", "runs/one", "--save", "tiny.yaml")
    assert status == 2
    assert "cannot write to tiny.yaml" in err
    assert "choose another --save" in err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FineTuned, "save", full)
    status, out, err = trajshift("finetune", "runs/one", "--save", "tuned")
    assert status == 2
    assert "no space left on the disk of tuned" in err
    assert "accuracy" in out
    assert "six" in out


def test_finetune_evaluate_report(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    status, out, err = trajshift("finetune", "runs/one", "six", "side", "finetune.steps=1", "--save", "tuned")
    assert status == 0, err
    assert "accuracy" in out
    assert sorted(path.name for path in (folder / "tuned").iterdir()) == ["side.safetensors", "six.safetensors"]
    trajshift("train", "tiny.yaml", "--name", "seed=0,rounds=1", "rounds=1", "--quiet")  # as a sweep names its runs
    status, out, err = trajshift("evaluate", "runs/seed=0,rounds=1", "finetune.steps=1")
    assert status == 0, err
    assert "accuracy" in out
    shutil.copy("runs/one/initialization.safetensors", "phi.safetensors")
    assert trajshift("finetune", "phi.safetensors", "--recipe", "tiny.yaml")[0] == 0
    status, _, err = trajshift("finetune", "phi.safetensors")
    assert (status, "--recipe" in err) == (2, True)
    status, _, err = trajshift("finetune", "runs/one", "sex")
    assert (status, "did you mean 'six'" in err) == (2, True)
    status, out, err = trajshift("evaluate", "runs/one", "--scratch", "--images", "8,all")
    assert status == 0, err
    assert "with 8 training images" in out
    assert "scratch" in out
    status, out, err = trajshift("report", "runs/one")
    assert status == 0, err
    assert (folder / "runs/one/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["finetune", "nowhere", "six"], "nowhere"),
        (["evaluate", "nowhere"], "there is no run directory nowhere"),
        (["evaluate", "tiny.yaml"], "there is no run directory tiny.yaml"),
        (["evaluate", "seed=1"], "no run directory"),
        (["report", "nowhere"], "there is no run directory nowhere"),
        (["sweep", "tiny.yaml", "meta_lr=1"], "several values"),
        (["sweep", "tiny.yaml", "meta_lr=1,2", "output.name=a"], "give --output DIR instead"),
        (["sweep", "tiny.yaml", "meta_lr=1,2", "--jobs", "-3"], "--jobs is -3; it must be at least 1 run"),
        (["sweep", "tiny.yaml", "meta_lr=1,2", "--output", "tiny.yaml"], "choose another --output"),
        (["report", ".", "--output", "tiny.yaml/page.html"], "is a folder without recipe.yaml"),
        (["evaluate", "nowhere", "--threads", "-1"], "--threads is -1; it must be at least 1 thread"),
        (["sweep", "tiny.yaml", "tuning={}", "meta_lr=1,2"], "tuning"),
        (["sweep", "tiny.yaml", "mta_lr=1,2"], "did you mean 'meta_lr'"),
    ],
)
def test_mistakes_of_the_other_commands(trajshift: Command, arguments: list[str], word: str) -> None:
    status, _, err = trajshift(*arguments)
    assert status == 2, err
    assert word in err
    assert err.count("\n") == 1


def test_sweep_chooses_and_goes_on(trajshift: Command, folder: Path) -> None:
    grid = ("rounds=1", "meta_lr=0.1,1", "seed=0,1")
    status, out, err = trajshift("sweep", "tiny.yaml", *grid, "--jobs", 1)
    assert status == 0, err
    assert "tried: the best may lie beyond" in out
    saved = json.loads((folder / "runs/tiny-sweep/sweep.json").read_text())
    assert [result["seeds"] for result in saved["results"]] == [2, 2]
    assert saved["choice"][""]["meta_lr"] in ("0.1", "1")
    runs = folder / "runs/tiny-sweep"
    before = files(runs, "sweep.json")
    assert trajshift("sweep", "tiny.yaml", *grid, "--jobs", 1)[0] == 0
    assert files(runs, "sweep.json") == before
    status, _, err = trajshift("sweep", "tiny.yaml", *grid, "inner.lr=0.1,0.2", "horizon=0", "--jobs", 1)
    assert (status, "horizon is 0" in err) == (2, True)


def test_demo_compares_whole_pipelines_with_equal_budgets(folder: Path) -> None:
    jobs = demo_jobs(folder, quick=False)
    assert {job.recipe.method for job in jobs} == {"trajectory-shifting", "reptile", "mtl", "single-task"}
    assert {job.recipe.total_steps for job in jobs} == {jobs[0].recipe.total_steps}
    assert {job.recipe.seed for job in jobs} == {0, 1, 2, 3, 4}
    assert len({job.path for job in jobs}) == len(jobs) == 20
    assert sum(job.scratch for job in jobs) == 5


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.4, 185, 7800)] == ["3 s", "3:05 min", "2:10 h"]


def test_a_saved_model_is_replaced_only_when_asked(trajshift: Command, folder: Path) -> None:
    trajshift("train", "tiny.yaml", "--name", "one", "--quiet")
    words = ("finetune", "runs/one", "finetune.steps=1", "--save", "kept")
    assert trajshift(*words)[0] == 0
    before = files(folder / "kept")
    assert before
    status, _, err = trajshift(*words, "finetune.lr=0.5")
    assert (status, files(folder / "kept")) == (2, before)
    assert "replace it with --force" in err
    assert trajshift(*words, "finetune.lr=0.5", "--force")[0] == 0
    assert files(folder / "kept") != before
