"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from trajshift import __version__
from trajshift.cli.data import app as data
from trajshift.cli.experiments import app as experiments
from trajshift.errors import UsageError
from trajshift.utils.files import shortened
from trajshift.utils.streams import output_failure, prepare_streams, say, settle_streams

_RESUMABLE = ("demo", "evaluate", "sweep", "experiment", "data")
"""Commands that resume when they are run again."""


class _Group(TyperGroup):
    """Reports an interrupt, for which typer only sets the exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            remedy = "; rerun the same command to resume" if ctx.invoked_subcommand in _RESUMABLE else ""
            say(f"trajshift: interrupted{remedy}")
            raise typer.Exit(128 + signal.SIGINT) from None


app = typer.Typer(
    name="trajshift",
    cls=_Group,
    help="Learn one initialization from many tasks by continual trajectory shifting, and fine-tune from it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(experiments, name="experiment")
app.add_typer(data, name="data")

RecipeOrRun = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a built-in recipe, or a run directory.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields of the recipe, such as meta_lr=0.05."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trajshift {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="Folder for the runs and the page; default runs/demo.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and few steps: a check, not a result.")] = False,
) -> None:
    """Meta-train four methods on built-in digits, fine-tune each, print how well each does (under 2 minutes)."""
    from trajshift.experiments.demo import run_demo

    run_demo(output or Path("runs/demo-quick" if quick else "runs/demo"), quick=quick)


@app.command()
def train(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run named by --name, or the run directory given as RECIPE.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole recipe and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Meta-train a recipe into a run directory.

    Also: torchrun --nproc-per-node W -m trajshift train RECIPE
    """
    from trajshift.runs.signals import Signals

    with Signals():  # before the seconds that importing torch and loading data take
        _train(recipe, overrides or [], resume=resume, name=name, print_config=print_config, quiet=quiet)


def _train(
    recipe: str, overrides: list[str], *, resume: bool, name: str | None, print_config: bool, quiet: bool
) -> None:
    from trajshift.recipes.recipe import find, load, to_explained_yaml
    from trajshift.runs.directory import run_name

    given = [] if name is None else [f"output.name={json.dumps(name, ensure_ascii=False)}"]
    overrides = [*overrides, *given]
    loaded = load(recipe, overrides)
    if print_config:
        typer.echo(to_explained_yaml(loaded), nl=False)
        return
    if Path(recipe).is_dir():
        if not resume:
            raise UsageError(f"{recipe} is a run directory; resume it with --resume, or name a recipe")
        path = Path(recipe)
    else:
        path = Path(loaded.output.directory) / run_name(loaded, find(recipe).stem)
    from trajshift.runs.train import train as run

    outcome = run(loaded, path, resume=resume, quiet=quiet)
    if outcome.signal is not None and not outcome.complete:
        raise typer.Exit(128 + outcome.signal)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"{outcome.path}: {outcome.step} inner steps per task done; phi is in initialization.safetensors")


@app.command()
def finetune(
    start: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_INITIALIZATION",
            help="A run directory, a checkpoint, a file of weights (.safetensors, .pth) or hub:OWNER/NAME.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK | KEY.PATH=VALUE]...", help="Tasks of the recipe (default: its targets)."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe, if the file is not in a run directory.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the fine-tuned models.")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="Also train from scratch, for comparison.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace models that are in the --save folder.")] = False,
) -> None:
    """Fine-tune tasks from a learned initialization and print the test metrics."""
    from trajshift.cli import commands

    commands.finetune(start, words or [], recipe=recipe, save=save, scratch=scratch, force=force)


@app.command()
def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY.PATH=VALUE]...", help="Run directories, and overrides such as finetune.steps=300."
        ),
    ],
    images: Annotated[
        str | None, typer.Option(help="Numbers of training images per target, such as 100,500,all.")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also from every checkpoint kept, for accuracy against inner steps.")
    ] = False,
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch",
            help="Also without meta-training (from scratch, or the recipe's initialization), once per seed.",
        ),
    ] = False,
    section: Annotated[str, typer.Option(help="Tasks to fine-tune: targets or tuning.")] = "targets",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default as in the first run.")] = None,
) -> None:
    """Fine-tune the targets of finished runs and compare the methods over seeds.

    Results are kept in the runs' evaluation.jsonl; existing ones are not computed again.
    """
    from trajshift.cli import commands

    commands.evaluate(words, images=images, checkpoints=checkpoints, scratch=scratch, section=section, threads=threads)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories.")],
    output: Annotated[Path | None, typer.Option(help="The page or its folder; default report.html in the run.")] = None,
) -> None:
    """Write a page with curves, comparison and recipes, from the saved files of one run or many."""
    from trajshift.cli import commands

    commands.report(runs, output)


@app.command()
def methods() -> None:
    """List the methods, one line and the reference each."""
    from trajshift.algorithm.methods import METHODS

    for method in METHODS.values():
        typer.echo(f"{method.name:20}{method.summary}\n{'':20}{method.reference}")


@app.command()
def sweep(
    recipe: RecipeOrRun,
    grid: Annotated[
        list[str], typer.Argument(metavar="FIELD=A,B,C...", help="Values to try; every combination is a run.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/RECIPE-sweep.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default one per core, at most.")] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Extend the grid beyond an end of the rates (fields in lr) while the best is there."
        ),
    ] = False,
) -> None:
    """Train a grid of runs, fine-tune each on the recipe's tuning tasks, and choose for each method.

    Joint training has no meta_lr and is run once for all of its values. Resumable: rerun the same
    command to resume.
    """
    from trajshift.runs.sweep import run_sweep

    run_sweep(recipe, grid, output=output, jobs=jobs, extend=extend)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2."""
    prepare_streams()
    try:
        app()
    except UsageError as error:
        _fail(str(error))
    except OSError as error:
        failure = output_failure(probe=True)
        if failure is None and error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            _fail(f"{shortened(str(error.filename))!r} cannot be used ({error.strerror}); name another file or folder")
        if failure is None:
            raise
        _fail(f"stdout cannot be written ({failure.strerror or error}); what was computed is in the files")
    except SystemExit:
        failure = output_failure()
        if failure is not None and failure.errno != errno.EPIPE:
            _fail(f"stdout cannot be written ({failure.strerror}); what was computed is in the files")
        raise
    finally:
        settle_streams()


def _fail(sentence: str) -> NoReturn:
    if output_failure() is None and sys.stdout is not None:
        sys.stdout.flush()
    say(f"trajshift: {sentence}")
    settle_streams()
    sys.exit(2)
