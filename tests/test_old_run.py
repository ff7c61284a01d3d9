"""Runs that version 0.1.0 left stopped in the middle of a round resume and evaluate (see `data/run-0.1/README.md`)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trajshift.cli.main import main

OLD = Path(__file__).parent / "data" / "run-0.1"
TOLERANCE = 1e-4
"""Absolute, of phi and of losses. Kernels for other CPUs (plain, AVX2, AVX-512) differ by up to 3e-6 in phi and 4e-7 in
the losses of these runs, whose networks are smooth so that rounding grows slowly. The steps after the checkpoint change
phi by more than a hundred times the tolerance and the losses by more than five times."""


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`trajshift WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["trajshift", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["shifting", "accurate"])
def test_a_run_of_0_1_is_resumed_and_evaluated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = tmp_path / name, OLD / "whole" / name
    shutil.copytree(OLD / "stopped" / name, run)
    before = rows(run)
    command(monkeypatch, "evaluate", str(run), "--checkpoints", "--threads", "1")
    assert rows(run) == before, "rows of the old version were not found again"

    stopped = load_file(run / "checkpoints" / "000000008" / "shared.safetensors")
    command(monkeypatch, "train", str(run), "--resume", "--quiet")
    phi, expected = (load_file(folder / "initialization.safetensors") for folder in (run, whole))
    assert phi.keys() == expected.keys()
    for label, tensor in phi.items():
        torch.testing.assert_close(tensor, expected[label], rtol=0.0, atol=TOLERANCE, msg=label)
    assert max(float((tensor - stopped[f"phi/{label}"]).abs().max()) for label, tensor in phi.items()) > 100 * TOLERANCE
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12]

    command(monkeypatch, "evaluate", str(run), "--threads", "1")
    assert rows(run)[: len(before)] == before
    for row, old, last in zip(rows(run)[len(before) :], rows(whole), before[-2:], strict=True):
        differing = {field for field in old if row[field] != old[field]}
        assert differing <= {"phi", "accuracy", "loss"}
        assert row["loss"] == pytest.approx(old["loss"], rel=0.0, abs=TOLERANCE)
        assert abs(row["loss"] - last["loss"]) > 5 * TOLERANCE
