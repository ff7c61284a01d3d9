"""`trajshift data ...`: the registered data sets. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from trajshift.errors import UsageError

app = typer.Typer(
    help="List, prepare and check the paper's data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Root = Annotated[Path, typer.Option("--root", help="Folder of the caches.")]


@app.command("list")
def list_sets(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Show all facts about these.")] = None,
    root: Root = Path("data"),
) -> None:
    """List the registered data sets, or all that is known about some of them, with sources."""
    from dataclasses import asdict

    from trajshift.data.registry import find, registered
    from trajshift.utils.terminal import console, print_table

    for name in names or ():
        for field, value in asdict(find(name)).items():
            if field == "sources":
                for fact, source in value.items():
                    console().print(f"  source of {fact}: {source}", soft_wrap=True)
            else:
                shown = "null" if value is None else value
                console().print(f"{name if field == 'name' else f'  {field}: {shown}'}", soft_wrap=True)
    if names:
        return
    rows = []
    for name, entry in registered().items():
        prepared = "yes" if (root / (entry.whole or name)).is_dir() else "-"
        figures = (entry.size, entry.channels, entry.classes, entry.train_images, entry.test_images)
        rows.append([name, entry.hub, entry.verified or "never", prepared, *map(_figure, figures)])
    header = ["data set", "hub", "verified", "prepared", "pixels", "channels", "classes", "train", "test"]
    print_table(header, rows, f"registered data sets; prepared: in {root}", text=4)


def _figure(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


@app.command()
def prepare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="NAME... [FIELD=VALUE]...", help="Data sets, and fields such as size=224."),
    ],
    root: Root = Path("data"),
    copy: Annotated[
        Path | None, typer.Option("--from", help="A local copy of the repository, instead of the hub; for one NAME.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that decode; default one per core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False,
) -> None:
    """Download data sets, decode and resize every image once, write memory-mapped caches.

    Resumable: rerun the same command to resume. Fields that can be set: hub, revision, subset, train, test,
    image, label, size.
    """
    from trajshift.cli.commands import split_words
    from trajshift.data.registry import find
    from trajshift.recipes.yaml_text import as_written, parse_value

    names, settings = split_words(words)
    if not names:
        raise UsageError("no data set was named; see: trajshift data list")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}; use at least 1")
    wholes = list(dict.fromkeys(find(name).whole or name for name in names))
    if copy is not None and len(wholes) > 1:
        raise UsageError(f"--from is a copy of one repository, but {len(wholes)} are named; name one")
    if len(wholes) > 1 and any(text.startswith("hub=") for text in settings):
        raise UsageError(f"hub= is one repository, but {len(wholes)} data sets are named; name one")
    fields = {field: parse_value(value) for field, _, value in (text.partition("=") for text in settings)}
    fields = {field: value if field == "size" else as_written(value) for field, value in fields.items()}

    from trajshift.data.cache_writer import prepare_cache
    from trajshift.utils.files import disk_errors
    from trajshift.utils.processes import cores
    from trajshift.utils.terminal import console

    for name in wholes:
        with disk_errors(root, option="--root", again=shlex.join(["trajshift", *sys.argv[1:]])):
            folder = prepare_cache(name, root, copy=copy, jobs=jobs or cores(), overrides=fields, quiet=quiet)
        console().print(f"{name} is in {folder}", soft_wrap=True)


@app.command("check")
def check_caches(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all in the folder.")] = None,
    root: Root = Path("data"),
) -> None:
    """Compare caches with their checksums, and their figures with the registered ones."""
    from trajshift.data.cache_reader import check_cache, figures_that_differ
    from trajshift.data.registry import find, registered
    from trajshift.utils.terminal import console

    there = [name for name, entry in registered().items() if entry.whole is None and (root / name).is_dir()]
    wholes = list(dict.fromkeys(find(name).whole or name for name in names or there))
    if not wholes:
        raise UsageError(f"there is no cache in {root}; make one with: trajshift data prepare NAME --root {root}")
    damaged = []
    for name in wholes:
        try:
            manifest = check_cache(root, name)
        except UsageError as error:
            damaged.append(name)
            console().print(f"{name}: {error}", soft_wrap=True)
            continue
        images = ", ".join(f"{shape[0]:,} {split}" for split, shape in manifest["images"].items())
        pixels = "x".join(map(str, manifest["images"]["train"][1:]))
        console().print(f"{name}: complete; {images} images of {pixels}, {len(manifest['class_names'])} classes")
        differing = figures_that_differ(manifest, find(name))
        for sentence in differing:
            console().print(f"  warning: {sentence}", soft_wrap=True)
        for sentence in manifest["differs_from_registry"]:
            if sentence not in differing:
                console().print(f"  when it was made, {sentence}", soft_wrap=True)
    if damaged:
        raise UsageError(f"{len(damaged)} of {len(wholes)} caches are damaged, missing or wrong: {', '.join(damaged)}")
