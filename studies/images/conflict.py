"""How alike the eight sources are: cosines between the directions their learners take from one start.

    python -m studies.images.conflict DATA [INITIALIZATION]     # from a random start if none is named

Every source is trained for 200 inner steps from the start, alone, as Reptile's learners are, and its displacement
theta - phi of the shared parameters is compared with the others'. Pairs near 0 pull phi in unrelated directions, pairs
below 0 in opposite ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from studies.command import new_app, run_app
from trajshift.recipes.build_trainer import build_trainer
from trajshift.recipes.recipe import load

app = new_app()


@app.command()
def conflict(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of the twelve .npz files.")],
    initialization: Annotated[
        Path | None, typer.Argument(metavar="INITIALIZATION", help="A file of phi; default a random start.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Further changes of the recipe.")
    ] = None,
) -> None:
    """Print the cosines between the displacements of the sources from one start."""
    settings = ["method=reptile", "inner.lr=0.02", "meta_lr=1", "rounds=1", f"data.root={data}", "threads=1"]
    if initialization is not None:
        settings.append(f"initialization={initialization}")
    trainer = build_trainer(load("small-images", [*settings, *(change or [])]))
    first = trainer.phi.clone()
    names: tuple[str, ...] = ()
    for event in trainer:
        names = event.tasks
    moved = torch.nn.functional.normalize(trainer.theta - first, dim=1)
    print(f"| cosine | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, row in zip(names, (moved @ moved.T).tolist(), strict=True):
        print(f"| {name} | {' | '.join(f'{value:+.2f}' for value in row)} |")


if __name__ == "__main__":
    run_app(app, "studies.images.conflict")
