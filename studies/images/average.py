"""Averages phi over checkpoints of a run (a candidate of results/images/README.md).

Command: python studies/images/average.py RUN OUT.safetensors STEP...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from trajshift.learners.initialization import Initialization, load_initialization
from trajshift.runs.starting_points import phi_of

if len(sys.argv) < 4 or not all(word.isdigit() for word in sys.argv[3:]):
    print(
        "average.py: name a run, the file to write and checkpoint steps: RUN OUT.safetensors STEP...", file=sys.stderr
    )
    sys.exit(2)
run, out, *steps = sys.argv[1:]
final = load_initialization(Path(run) / "initialization.safetensors")
saved = [phi_of(Path(run) / "checkpoints" / f"{int(step):09d}") for step in steps]
mean = {name: torch.stack([phi[name] for phi in saved]).mean(0) for name in final}
Initialization(mean, final.about).save(out)
