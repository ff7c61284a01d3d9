"""Every benchmark at toy size: that it runs and writes what it should, not how fast."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import alternatives, gpu, libraries, naive, scaling
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.alternatives import Learners
from benchmarks.harness import Process, SideFailed, Spread, interleave, ratio, spread
from benchmarks.idle import gaps_percent, idle_percent
from benchmarks.report import Claim, write
from benchmarks.sides.naive import Naive
from benchmarks.sides.ours import advance
from benchmarks.sides.plain import Plain
from benchmarks.traffic import count
from benchmarks.workload import META_LR, TINY, build_trainer
from tests.helpers.sides import sides

OURS = "benchmarks.sides.ours:steps"


def run(*arguments: str) -> int | str | None:
    """The exit status of the command."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


def checked(folder: Path, name: str) -> dict[str, Any]:
    """What a benchmark wrote, after a look at all files."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert found["command"] == f"python -m benchmarks {name} --toy"
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["tables"]
    assert found["samples"]
    page = (folder / f"{name}-{found['date']}.md").read_text()
    assert "not a result" in page
    assert found["environment"]["processor"] in page
    for table in found["tables"]:
        assert all(len(row) == len(table["header"]) for row in table["rows"])
        assert table["caption"] in page
    for claim in found["claims"]:
        assert claim["text"] in page
    text = json.dumps(found) + page
    assert str(folder) not in text
    assert str(Path(__file__).parents[2]) not in text
    if found["panels"]:
        assert (folder / "speed.svg").read_text().startswith("<?xml")
    return found


@pytest.fixture
def nearby(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks whose sides have no process of their own."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    for module in (libraries, naive, scaling):
        monkeypatch.setattr(module, "Process", sides)


@pytest.mark.usefixtures("nearby")
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("gpu", "libraries")])
def test_it_runs_and_writes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--toy", "--out", str(tmp_path)) == 0
    found = checked(tmp_path, name)
    printed = capsys.readouterr().out
    assert all(claim["text"] in printed for claim in found["claims"])


# -- libraries -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nearby")
def test_libraries_that_are_missing_are_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"higher": "higher is not installed", "torchopt": "torchopt is not installed"}
    monkeypatch.setattr(libraries, "unusable", lambda: reasons)
    assert run("libraries", "--toy", "--out", str(tmp_path)) == 0
    rows = checked(tmp_path, "libraries")["tables"][0]["rows"]
    assert [row[0] for row in rows] == ["trajshift"] * 2 + list(libraries.SIDES)[1:]
    assert ["higher, unrolled", "-", "higher is not installed", "-", "-"] in rows


@pytest.mark.filterwarnings("ignore:invalid escape sequence", 'ignore:"is" with')  # in the source of higher
@pytest.mark.parametrize("side", list(libraries.SIDES)[1:])
def test_a_library_takes_a_round(side: str) -> None:
    package = libraries.library(side)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra `benchmarks`)")
    with sides(libraries.SIDES[side], {**TINY.options(), "horizon": 2}) as one:
        assert one(1) > 0.0


# -- GPU -------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_one_sentence_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("gpu", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out == "gpu: there is no CUDA device on this machine, so nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_all_parts_of_the_gpu_benchmark_run(tmp_path: Path) -> None:
    write("gpu", gpu.measure_on(torch.device("cpu"), gpu.TOY), tmp_path, toy=True)
    parts = checked(tmp_path, "gpu")["tables"][-1]["rows"]
    assert [part[:2] for part in parts] == [
        [name, "done"]
        for name in (
            "the paper's run", "engines", "kernels", "flat update", "memory", "ResNet18", "ResNet18 in bfloat16",
        )
    ]  # fmt: skip


def test_time_that_no_kernel_covers() -> None:
    """Of 10 units, 2 to 3 and 7 to 9 lie bare; intervals may overlap and hold one another."""
    assert gaps_percent([(5.0, 7.0), (0.0, 2.0), (3.0, 6.0), (3.5, 4.0), (9.0, 10.0)]) == pytest.approx(30.0)
    assert gaps_percent([(1.0, 2.0)]) == 0.0
    assert idle_percent(lambda: None, torch.device("cpu")) is None


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory\nmore")

    for part in ("measure_paper", "_engines", "_memory"):
        monkeypatch.setattr(gpu, part, fail)
    parts = gpu.measure_on(torch.device("cpu"), gpu.TOY).tables[-1].rows
    failed = "failed, RuntimeError: out of memory"
    assert [part[1] for part in parts] == [failed, failed, "done", "done", failed, "done", "done"]


def test_the_batched_call_makes_the_gradients_of_each_learner() -> None:
    learners = Learners(alternatives.TOY.workloads[0])
    together = learners.batched()
    for index, model in enumerate(learners.models):
        F.cross_entropy(model(learners.x[index]), learners.y[index]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad, rtol=1e-3, atol=1e-4)


def test_work_is_counted_as_by_hand() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    work = count(lambda: a @ b + torch.ones(5).expand(2, 5).t().t())
    assert work.flops == 2 * 2 * 3 * 5
    product, ones, added = 4 * (6 + 15 + 10), 4 * 5, 4 * (10 + 5 + 10)
    assert work.bytes == product + ones + added


# -- the sides do what they are said to do ---------------------------------------------------------------------------


def test_plain_training_is_the_loop_without_meta_learning() -> None:
    trainer = build_trainer(TINY, engine="loop", method="no-shifting")
    trainer.advance()
    plain = Plain(trainer)
    held = copy.deepcopy(plain.models)
    for learner, model, optimizer in zip(trainer.learners, plain.models, plain.optimizers, strict=True):
        for name, parameter in {**learner.shared, **learner.own}.items():
            kept = learner.optimizer.state[parameter]["momentum_buffer"].clone()
            optimizer.state[model.get_parameter(name)]["momentum_buffer"] = kept
    plain.take(3)
    advance(trainer)(3)
    for learner, model, before in zip(trainer.learners, plain.models, held, strict=True):
        for name, parameter in learner.module.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter)
            assert not torch.equal(before.get_parameter(name), parameter)


def test_the_naive_twin_shifts_by_the_mean_displacement() -> None:
    twin = Naive(TINY)
    twin.take(2)
    twin.inner_step()
    phi = {name: tensor.clone() for name, tensor in twin.phi.items()}
    theta = {name: torch.stack([one.detach() for one in ones]) for name, ones in twin.thetas.items()}
    twin.meta_update()
    for name in phi:
        delta = -META_LR * (phi[name] - theta[name]).mean(0)
        torch.testing.assert_close(twin.phi[name], phi[name] + delta)
        for before, after in zip(theta[name], twin.thetas[name], strict=True):
            torch.testing.assert_close(after.detach(), before + delta)


# -- harness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (9, 2, 8), (10, 2, 9), (20, 6, 15), (30, 10, 21)]
)
def test_the_interval_of_a_median(count: int, low: float, high: float) -> None:
    found = spread([float(value) for value in range(count, 0, -1)])
    assert found == Spread((count + 1) / 2, low, high, count)


def test_sides_take_turns_and_ratios_are_of_neighbours() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, seconds: float) -> Any:
        def take(steps: int) -> float:
            calls.append((name, steps))
            return seconds * len(calls) * steps

        return take

    found = interleave({"a": side("a", 2.0), "b": side("b", 1.0)}, steps={"a": 1, "b": 3}, rounds=2, title="toy")
    assert calls == [("a", 1), ("b", 3)] * 3
    assert found == {"a": [6.0, 10.0], "b": [4.0, 6.0]}
    assert ratio(found["a"], found["b"]).low == 1.5


def test_a_claim_is_met_on_the_right_side_of_its_limit() -> None:
    measured = Spread(2.0, 1.0, 3.0, 7)
    assert Claim("faster", measured, 1.5, at_least=True).met
    assert not Claim("slower", measured, 1.5, " %").met
    assert Claim("slower", measured, 1.5, " %").cells() == ["slower", "2 % (1 to 3)", "at most 1.5 %", "missed"]


def test_a_process_tells_time_and_memory() -> None:
    with Process(OURS, {"engine": "loop", **TINY.options()}) as process:
        assert process(2) > 0.0
        assert process.peak_bytes >= process.start_bytes > 50e6


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(SideFailed, match=r"TypeError: .*engine"), Process(OURS, {}) as process:
        process(1)


# -- the command -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("overhaed", "--toy") == 2
    assert capsys.readouterr().err == "benchmarks: unknown benchmark 'overhaed'; did you mean 'overhead'?\n"


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("benchmarks.startup.COMMANDS", {"import torch": ("-c", "pass")})
    assert run("startup", "--toy", "--out", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("choose another --out")
