"""What the commands of the studies have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from trajshift.errors import UsageError
from trajshift.utils.processes import stop_on_signal


def new_app() -> typer.Typer:
    """A command line in the style of `trajshift`."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Runs the command line of the module `name` and exits.

    A user's mistake is one sentence on stderr and exit status 2.
    """
    try:
        app(arguments, prog_name=f"python -m {name}")
    except UsageError as error:
        sys.stdout.flush()
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def resumable() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does; either way the command exits with status 130 and a note."""
    try:
        with stop_on_signal():
            yield
    except KeyboardInterrupt:
        print("stopped; rerun the same command to resume", file=sys.stderr)
        raise typer.Exit(130) from None
