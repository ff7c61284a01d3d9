"""`trajshift experiment ...`: the paper's experiments. Nothing here imports torch before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trajshift.errors import UsageError
from trajshift.experiments.images.catalogue import EXPERIMENTS

app = typer.Typer(
    help="Run an experiment of the paper: numbers, figures and a page.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results; default runs/NAME.")]


@app.command()
def landscape(
    out: Out = None,
    study: Annotated[
        bool,
        typer.Option(
            "--study",
            help="Also compare all methods over all starts and 20 random task sets, tuned; 20 minutes of one core.",
        ),
    ] = False,
) -> None:
    """The synthetic study (section 4.1): figures 4 and 5, findings and a page to play with (under a minute)."""
    from trajshift.experiments.landscape.experiment import run_experiment

    run_experiment(out or Path("runs/landscape"), study=study)


@app.command("approximation-error")
def approximation_error(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY.PATH=VALUE]...",
            help="A recipe whose tasks, model and batches are used (default: small networks on two digits tasks), "
            "and fields of it.",
        ),
    ] = None,
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two draws and few steps: a check, not a result.")] = False,
) -> None:
    """How far a shifted trajectory is from the one it approximates (section 3.3): figure 3, orders, better shifts.

    About 8 minutes on two cores with the default recipe; measurements are kept, and rerunning the same command resumes.
    """
    from trajshift.cli.commands import split_words
    from trajshift.experiments.approximation.experiment import run_experiment
    from trajshift.experiments.approximation.measurement_plan import QUICK

    default = Path("runs/approximation-error-quick" if quick else "runs/approximation-error")
    names, overrides = split_words(words or [])
    if len(names) > 1:
        raise UsageError(f"two recipes are named, {names[0]!r} and {names[1]!r}; name one")
    recipe = names[0] if names else None
    run_experiment(out or default, recipe, overrides, plan=QUICK if quick else None)


def _published(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields of every run, such as data.root=DIR device=cuda."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(help="full: as published; small: for two cores; check: a few steps, to see that everything runs."),
    ] = "full",
    seeds: Annotated[int, typer.Option(help="Whole pipelines per method, seeds 0, 1, ...")] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs and the page.")] = None,
    tuned: Annotated[
        list[Path] | None,
        typer.Option(
            help="The sweep.json of a sweep over method=...: its methods use the chosen rates. May be repeated."
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default one per core, one on a GPU.")] = None,
) -> None:
    from trajshift.experiments.images.run import run_published

    run_published(
        str(context.info_name),
        scale=scale,
        seeds=seeds,
        overrides=overrides or [],
        out=out,
        workers=jobs,
        tuned=tuned or (),
    )


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=f"{_experiment.summary} Resumable: rerun the same command to resume.")(_published)
