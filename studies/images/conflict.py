"""How alike the eight sources are: cosines between the ways their learners go from one start.

Every source is trained for 200 inner steps from the start, alone, as Reptile's learners are, and its displacement
theta - phi of the shared parameters is compared with the others'. Pairs near 0 pull phi in unrelated directions, pairs
below 0 in opposite ones.

Command: python studies/images/conflict.py DATA [INITIALIZATION]     # from a random start where none is named
"""

from __future__ import annotations

import sys

import torch

from trajshift.recipes.build_trainer import build_trainer
from trajshift.recipes.recipe import load

if __name__ == "__main__":
    start = [f"initialization={path}" for path in sys.argv[2:3]]
    asked = ["method=reptile", "inner.lr=0.02", "meta_lr=1", "rounds=1", f"data.root={sys.argv[1]}", "threads=1"]
    trainer = build_trainer(load("small-images", [*asked, *start]))
    first = trainer.phi.clone()
    for _ in trainer:
        pass
    moved = torch.nn.functional.normalize(trainer.theta - first, dim=1)
    names = trainer.meta_step.active.names
    print(f"| cosine | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, row in zip(names, (moved @ moved.T).tolist(), strict=True):
        print(f"| {name} | {' | '.join(f'{value:+.2f}' for value in row)} |")
