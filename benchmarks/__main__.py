"""`python -m benchmarks NAME... [--toy] [--out DIR]`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from trajshift.errors import UsageError, nearest
from trajshift.utils.imports import need_report_extra

BENCHMARKS = {
    "overhead": "the same learners with and without meta-learning; the flat update; logging",
    "naive": "against the usual hand-written way, on the CPU",
    "libraries": "against higher and torchopt: time and memory of an inner step",
    "scaling": "time and memory with T, K, P and ranks",
    "landscape": "the vectorised twin of the plane against the loop",
    "startup": "from nothing to the first step, and the demo",
    "alternatives": "ways that were tried and not kept: one batched call, torch.compile",
    "gpu": "everything about one GPU, in about five minutes",
}
ALL = "all"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help="Measure how fast it is. NAME is:\n\n" + "\n\n".join(f"{n}: {s}" for n, s in BENCHMARKS.items()))
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Benchmarks to run, or `all`.")],
    toy: Annotated[
        bool, typer.Option("--toy", help="As small as possible: a check that it runs, not a result.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results; default results/speed, runs/speed-toy.")
    ] = None,
) -> None:
    """Runs the benchmarks named, one after another."""
    for name in names:
        if name not in (*BENCHMARKS, ALL):
            raise UsageError(f"unknown benchmark {name!r}{nearest(name, (*BENCHMARKS, ALL))}")
    need_report_extra()
    from benchmarks.report import write

    for name in BENCHMARKS if ALL in names else names:
        report = import_module(f"benchmarks.{name}").measure(toy=toy)
        if isinstance(report, str):  # nothing can be measured here
            print(report)
        else:
            write(name, report, out or Path("runs/speed-toy" if toy else "results/speed"), toy=toy)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; a user's mistake is one sentence on stderr and exit status 2."""
    try:
        app(arguments, prog_name="python -m benchmarks")
    except UsageError as error:
        sys.stdout.flush()
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
