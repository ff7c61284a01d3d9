"""Averages phi over checkpoints of a run (a candidate of results/images/README.md).

python -m studies.images.average RUN OUT.safetensors STEP...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from studies.command import new_app, run_app
from trajshift import Initialization, load_initialization
from trajshift.errors import UsageError
from trajshift.runs.starting_points import phi_of
from trajshift.training.checkpoint_files import checkpoint_folders

app = new_app()


@app.command()
def average(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    steps: Annotated[list[int], typer.Argument(metavar="STEP", help="Inner steps of the checkpoints.")],
) -> None:
    """Write the mean of phi over checkpoints, in the form of a run's initialization.safetensors."""
    there = checkpoint_folders(path / "checkpoints")
    for step in steps:
        if step not in there:
            raise UsageError(
                f"{path} has no checkpoint of step {step}; there are: {', '.join(map(str, there)) or 'none'}"
            )
    final = load_initialization(path / "initialization.safetensors")
    saved = [phi_of(there[step]) for step in steps]
    mean = {name: torch.stack([phi[name] for phi in saved]).mean(0) for name in final}
    Initialization(mean, final.about).save(out)


if __name__ == "__main__":
    run_app(app, "studies.images.average")
