"""On a GPU: recorded steps are the loop, the loop is that of the CPU, and a run goes on on either."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.traffic import launches
from tests.helpers.graphs import MIXES, STEPS, peeking, tasks, trainer
from tests.helpers.learners import assert_same, everything, run, same_bits
from tests.helpers.options import build
from trajshift import Inner, MetaTrainer, Task
from trajshift.evaluation.finetuning import finetune
from trajshift.models import build_model
from trajshift.models.kernels.switch import eager_kernels
from trajshift.training.checkpoint import load, save
from trajshift.utils.files import read_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def on_gpu(engine: str, listed: list[Task] | None = None, **options: Any) -> MetaTrainer:
    made = trainer(engine, listed, device="cuda", **options)
    assert made.engine.name == engine
    return made


@pytest.mark.parametrize("options", MIXES, ids=str)
def test_recorded_steps_are_the_loop(options: dict[str, Any]) -> None:
    """Float64, 50 steps, over round boundaries, with augmentation, BatchNorm, momentum and a schedule."""
    here, loop, graph = trainer("loop", **options), on_gpu("loop", **options), on_gpu("graph", **options)
    for _ in range(STEPS):
        left, middle, right = here.advance(), loop.advance(), graph.advance()
        torch.testing.assert_close(left.losses, middle.losses.cpu(), **CLOSE)
        torch.testing.assert_close(middle.losses, right.losses, **CLOSE)
    assert_same(here, loop)
    assert_same(loop, graph)
    assert graph.engine.name == "graph"


def test_learners_share_streams_and_tables_are_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajshift.training.engines.cuda_graph.AHEAD", 8)
    six = [replace(task, name=f"{task.name}{copy}") for copy in range(3) for task in tasks()]
    loop, graph = on_gpu("loop", six), on_gpu("graph", six)
    assert_same(run(loop, 30), run(graph, 30))


def resnets(engine: str, autocast: torch.dtype | None, method: str = "trajectory-shifting") -> MetaTrainer:
    """ResNet20s in float32."""
    return build(
        lambda task: build_model("resnet20", task),
        tasks(),
        method,
        horizon=6,
        rounds=5,
        batch_size=5,
        inner=Inner(lr=0.01, options={"momentum": 0.9}),
        autocast=autocast,
        device="cuda",
        engine=engine,
    )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_recorded_resnet_takes_the_loops_step_and_repeats_to_the_last_bit(
    autocast: torch.dtype | None, tmp_path: Path
) -> None:
    """One step from a shared state; rounding grows beyond use in more."""
    graph, again, loop = (resnets(engine, autocast) for engine in ("auto", "auto", "loop"))
    run(graph, 15)
    run(again, 15)
    assert same_bits(everything(graph), everything(again))
    save(tmp_path, graph.meta_step)
    load(tmp_path / f"{15:09d}", loop.meta_step)
    torch.testing.assert_close(loop.advance().losses, graph.advance().losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loop.phi, graph.phi, rtol=1e-3, atol=1e-4)
    assert graph.engine.name == "graph"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_fused_kernels_take_the_step_of_pytorchs(autocast: torch.dtype | None) -> None:
    """One step from a shared state, and a second run repeats fifteen to the last bit (above)."""
    fused = resnets("loop", autocast)
    with eager_kernels():
        plain = resnets("loop", autocast)
    with launches() as launched:
        ours = fused.advance().losses
    assert launched
    with launches() as launched:
        theirs = plain.advance().losses
    assert not launched
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if autocast is None else 2e-2, atol=1e-3)
    assert_near(fused.theta - fused.phi, plain.theta - plain.phi, 1e-2 if autocast is None else 0.1)


def assert_near(left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """To a share of their size: a rounding that flips a ReLU moves single numbers by more."""
    assert float((left - right).norm()) <= share * float(right.norm())


def test_second_derivatives_of_a_residual_network_run_without_fused_kernels() -> None:
    made = resnets("loop", None, method="imaml")
    with launches() as launched:
        run(made, 6)  # a meta-update at the end of the round
    assert launched
    assert bool(made.phi.isfinite().all())


@pytest.mark.parametrize("method", ["trajectory-shifting", "mtl"])
def test_a_step_that_cannot_be_recorded_is_left_to_the_loop(method: str) -> None:
    loop, graph = (peeking(engine, method, device="cuda") for engine in ("loop", "auto"))
    assert graph.engine.name == "graph"
    run(loop, 2)
    run(graph, 2)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        graph.advance()
    loop.advance()
    assert graph.engine.name == "loop"
    assert_same(run(loop, 20), run(graph, 20))


def test_a_checkpoint_goes_on_on_either_device(tmp_path: Path) -> None:
    whole = run(trainer("loop"), 30)
    for first in (trainer("loop"), on_gpu("graph")):
        save(tmp_path / str(first.device), run(first, 17).meta_step)
        for second in (trainer("loop"), on_gpu("loop"), on_gpu("graph")):
            load(tmp_path / str(first.device) / f"{17:09d}", second.meta_step)
            assert_same(whole, run(second, 13))


def test_fine_tuning_is_that_of_the_cpu() -> None:
    def double(task: Task) -> torch.nn.Module:
        return build_model("conv", task, width=4, depth=2).double()

    phi = run(trainer("loop"), 12).initialization
    found = [
        finetune(phi, tasks()[1], model=double, steps=30, batch_size=5, lr=0.03125, device=device)
        for device in ("cpu", "cuda")
    ]
    for name, tensor in found[0].module.state_dict().items():
        torch.testing.assert_close(tensor, found[1].module.state_dict()[name].cpu(), **CLOSE, msg=name)


def test_the_command_line_trains_on_the_gpu(tmp_path: Path) -> None:
    words = ["digits", "device=cuda", "rounds=2", f"output.directory={tmp_path}", "output.name=run"]
    done = subprocess.run([sys.executable, "-m", "trajshift", "train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be recorded" not in done.stderr
    assert json.loads((tmp_path / "run" / "choices.json").read_text())["engine"] == "graph"
    first, *_, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(last["tasks"][name]["loss"] < first["tasks"][name]["loss"] for name in first["tasks"])
