"""What the sub-commands do, after `main` has read their arguments. torch is imported where it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, load
from trajshift.report.terminal_summary import print_summary
from trajshift.runs.directory import RunDirectory
from trajshift.settings import at_least
from trajshift.utils.files import disk_errors
from trajshift.utils.imports import need_report_extra
from trajshift.utils.progress import Progress
from trajshift.utils.terminal import console, print_table

if TYPE_CHECKING:
    from trajshift.evaluation.finetuning import FineTuned


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names, and overrides: words with an equals sign that are not folders (a sweep names its runs by fields)."""
    names: list[str] = []
    overrides: list[str] = []
    for word in words:
        (overrides if "=" in word and not _is_folder(word) else names).append(word)
    return names, overrides


def _is_folder(word: str) -> bool:
    try:
        return Path(word).is_dir()
    except (OSError, ValueError):  # longer than a path can be, or with a zero byte
        return False


# finetune ---------------------------------------------------------------------------------------------------


def finetune(
    start: str, words: Sequence[str], *, recipe: str | None, save: Path | None, scratch: bool, force: bool = False
) -> None:
    """Fine-tune tasks from a run, a checkpoint or an initialization file, and print the test metrics."""
    names, overrides = split_words(words)
    path = Path(start)
    owner = recipe or (None if start.startswith("hub:") else _owner(path))
    if owner is None:
        raise UsageError(f"{start} is not in a run directory; name the recipe of its model and tasks with --recipe")
    loaded = load(owner, overrides)
    names = names or list(loaded.targets)
    if not names:
        raise UsageError(f"no task was named and {owner} has no targets; name a task of the recipe")
    source = _initialization_file(start)
    if save is not None:
        _refuse_to_replace(save, names, force=force)
        _refuse_what_cannot_be_written(save)

    from trajshift.distributed import World, set_threads
    from trajshift.evaluation.finetuning import finetune as tune
    from trajshift.recipes.build_tasks import build_tasks
    from trajshift.recipes.build_trainer import finetune_options
    from trajshift.runs.starting_points import load_phi

    set_threads(World(), loaded.execution.threads)
    phi = load_phi(source)
    tasks = build_tasks(loaded, names)
    options = finetune_options(loaded)
    rows: list[tuple[str, str, FineTuned]] = []
    try:
        for name, task in tasks.items():
            if task.test is None:
                console().print(
                    f"note: {name} has no test examples, so it has no metrics; set options.test to get some"
                )
            for label, initialization in ([("scratch", None)] if scratch else []) + [(path.name, phi)]:
                with Progress(f"{name} from {label}", loaded.finetune.steps) as progress:
                    tuned = tune(initialization, task, progress=lambda step, steps: progress.update(step), **options)
                rows.append((name, label, tuned))
                if save is not None and label != "scratch":
                    with disk_errors(save, option="--save", again="the same command"):
                        tuned.save(save / f"{name}.safetensors")
    finally:
        _print_tuned(rows, loaded.seed, loaded.finetune.steps)
    if save is not None:
        console().print(f"fine-tuned models are in {save}")


def _refuse_to_replace(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuses to write over a model, which may be the better one, unless it is asked for."""
    there = [folder / f"{name}.safetensors" for name in names if (folder / f"{name}.safetensors").exists()]
    if there and not force:
        raise UsageError(f"{there[0]} is there already; name another --save folder, or replace it with --force")


def _refuse_what_cannot_be_written(folder: Path) -> None:
    """Fails before hours of work, not after: creates the folder and a file in it, which is deleted again."""
    with disk_errors(folder, option="--save", again="the same command"):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def _print_tuned(rows: Sequence[tuple[str, str, FineTuned]], seed: int, steps: int) -> None:
    """The test metrics of the tasks that were fine-tuned, also where a later one failed."""
    if not rows:
        return
    metrics = list(dict.fromkeys(metric for _, _, tuned in rows for metric in tuned.metrics))
    print_table(
        ["task", "start", "images", "steps", *metrics],
        [
            [name, label, str(tuned.images), str(steps), *(_metric(tuned.metrics, m) for m in metrics)]
            for name, label, tuned in rows
        ],
        f"fine-tuned with seed {seed}, on the test sets",
        text=2,
    )


def _metric(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else "-"


def _owner(path: Path) -> Path | None:
    """The run directory that a run, one of its checkpoints or its initialization belongs to."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None


def _initialization_file(start: str) -> Path:
    """The file or checkpoint behind a run directory, a checkpoint folder, a file or weights on the hub."""
    if start.startswith("hub:"):
        from trajshift.learners.pretrained import locate

        return locate(start)
    path = Path(start)
    if path.is_dir() and (path / "manifest.json").is_file():
        return path
    if path.is_dir():
        run = RunDirectory(path)
        if not run.initialization.is_file():
            raise UsageError(
                f"{path} has no initialization.safetensors; finish the run with: trajshift train --resume {path}"
            )
        return run.initialization
    if not path.is_file():
        raise UsageError(f"no run directory or initialization file at {path}")
    return path


# evaluate, report -------------------------------------------------------------------------------------------


def evaluate(
    words: Sequence[str], *, images: str | None, checkpoints: bool, scratch: bool, section: str, threads: int | None
) -> None:
    """Fine-tune the targets of finished runs, keep the rows, and print the comparison."""
    from trajshift.evaluation.comparison import summary_tables
    from trajshift.runs.evaluate_runs import evaluate_runs

    at_least("--threads", threads, 1, "thread")
    runs, overrides = split_words(words)
    if not runs:
        raise UsageError("no run directory was named; give at least one, such as runs/NAME")
    _refuse_what_is_no_run(runs)
    need_report_extra()
    recipes: list[Recipe] = [load(run, overrides) for run in runs]

    from trajshift.distributed import World, set_threads

    set_threads(World(), threads or recipes[0].execution.threads)
    again = "the same command"
    with Progress("fine-tuning", 1) as progress, disk_errors(Path(runs[0]), option="folder", again=again):

        def show(done: int, total: int, what: str) -> None:
            progress.total = total
            progress.update(done, note=what)

        rows = evaluate_runs(
            runs,
            targets=section,
            train_images=None if images is None else _sizes(images),
            checkpoints=checkpoints,
            scratch=scratch,
            overrides=overrides,
            progress=show,
        )
        progress.update(progress.total)
    for summary in summary_tables(rows):
        print_summary(summary)


def _refuse_what_is_no_run(runs: Sequence[str]) -> None:
    for run in runs:
        if not Path(run).is_dir():
            raise UsageError(f"there is no run directory {run}; name one that trajshift train has made")


def _sizes(text: str) -> list[int | None]:
    sizes: list[int | None] = []
    for part in text.split(","):
        if part != "all" and not (part.isdigit() and int(part) > 0):
            raise UsageError(f"--images contains {part!r}; write numbers above 0 or all, such as 100,500,all")
        sizes.append(None if part == "all" else int(part))
    return sizes


def report(runs: Sequence[str], output: Path | None) -> None:
    """Write the page of one run or many."""
    from trajshift.report.write_report import write_report

    _refuse_what_is_no_run(runs)
    with disk_errors(output or Path(runs[0]), option="--output", again="the same command"):
        page = write_report(runs, output)
    console().print(f"wrote {page}")
