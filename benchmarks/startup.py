"""Start-up: what a process needs for import, help and the first step, and the demo from end to end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.harness import ROOT, Steps, interleave, ratio, spread, timed
from benchmarks.report import Report, show, show_time
from trajshift.errors import UsageError
from trajshift.utils.progress import duration
from trajshift.utils.table import Table

TORCH = "import torch"
FIRST_STEP = """
import trajshift
from trajshift.data import digits_tasks
from trajshift.models import build_model
def model(task):
    return build_model("conv", task, width=16, depth=2)
trajshift.MetaTrainer(model, digits_tasks(), horizon=50, rounds=1, batch_size=32,
                      inner=trajshift.Inner(options={"momentum": 0.9})).advance()
"""
COMMANDS = {
    "python": ("-c", "pass"),
    TORCH: ("-c", TORCH),
    "import trajshift": ("-c", "import trajshift"),
    "trajshift --help": ("-m", "trajshift", "--help"),
    "trajshift train digits --print-config": ("-m", "trajshift", "train", "digits", "--print-config"),
    "first step of 8 digits tasks": ("-c", FIRST_STEP),
}
ROUNDS = 10


def measure(*, toy: bool) -> Report:
    """All commands in turn; at toy size once, and without the demo."""
    sides = {name: timed(process(command)) for name, command in COMMANDS.items()}
    seconds = interleave(sides, steps=1, rounds=1 if toy else ROUNDS, warmup=0 if toy else 1, title="start-up")
    rows = [[name, show_time(spread(values)), show(ratio(values, seconds[TORCH]))] for name, values in seconds.items()]
    report = Report(title="Start-up (CPU)", samples=seconds)
    caption = "Whole processes, files in the system's cache. `import trajshift` and the help do not import torch."
    report.tables.append(Table(["process", "wall time", f"times `{TORCH}`"], rows, caption))
    if not toy:
        spent = demo()
        caption = "`trajshift demo`: four methods and scratch, 5 seeds, two processes, table and page."
        report.tables.append(Table(["demo", "wall time"], [["end to end", duration(spent)]], caption))
        report.samples["demo"] = [spent]
    return report


def demo() -> float:
    """Seconds of the whole demo."""
    with tempfile.TemporaryDirectory() as folder:
        return timed(process(("-m", "trajshift", "demo", "--output", folder)))(1)


def process(command: Sequence[str]) -> Steps:
    """Steps that are whole processes of this Python."""

    def take(count: int) -> None:
        for _ in range(count):
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(f"python {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")

    return take
