"""Recorded steps equal the loop, with a stand-in for CUDA graphs that keeps their rules on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.graphs import MIXES, STEPS, peeking, trainer
from tests.helpers.learners import ConvNet, assert_same, image_tasks, make, run
from tests.helpers.recording import Recorder
from trajshift import Inner, Task, UsageError
from trajshift.rng import repeatable
from trajshift.training.checkpoint import load, save
from trajshift.training.engines.choose import choose_engine
from trajshift.training.engines.cuda_graph import Graph, lanes_for, longest_first
from trajshift.training.engines.recorder import LANES, CudaRecorder


@pytest.mark.parametrize("options", MIXES, ids=str)
def test_replayed_steps_are_the_loop(options: dict[str, Any]) -> None:
    """Float64, 50 steps, over round boundaries, with augmentation, BatchNorm, momentum and a schedule."""
    recorder = Recorder()
    loop, graph = trainer("loop", **options), trainer(Graph(recorder), **options)
    for _ in range(STEPS):
        left, right = loop.advance(), graph.advance()
        assert left.meta_updated == right.meta_updated
        torch.testing.assert_close(left.losses, right.losses, rtol=1e-9, atol=1e-9)
    assert_same(loop, graph)
    assert loop.metrics()["inner_steps"] == graph.metrics()["inner_steps"] == STEPS
    assert loop.meta_step.counters.counts == graph.meta_step.counters.counts
    assert recorder.replays > STEPS - 15
    assert recorder.records <= 3


def test_a_recording_really_bakes_its_numbers_in() -> None:
    """The stand-in itself: a number from the host stays as it was, a tensor's value does not."""
    host, device, out = 1.0, torch.zeros(1), torch.zeros(1)

    def body() -> None:
        out.copy_(device + host)

    replay = Recorder().record(body)
    assert out == 0.0  # recorded, not done
    host = 5.0
    device.fill_(2.0)
    replay()
    assert out == 3.0
    with pytest.raises(RuntimeError, match="not permitted"):
        Recorder().record(lambda: out.fill_(device.item()))


def test_every_kind_of_step_is_taken_once_before_it_is_recorded() -> None:
    """Reptile's meta-update, which comes at the end of a round, is warmed up at the end of the first."""
    recorder = Recorder()
    reptile = trainer(Graph(recorder), method="reptile")
    seen = []
    for _ in range(3 * 12):
        before, step = recorder.records, reptile.advance().step
        seen += [step] if recorder.records > before else []
    assert seen == [4, 24]


@pytest.mark.parametrize("method", ["trajectory-shifting", "mtl"])
def test_a_step_that_cannot_be_recorded_is_left_to_the_loop(method: str) -> None:
    loop, graph = peeking("loop", method), peeking(Graph(Recorder(), or_loop=True), method)
    run(loop, 2)
    run(graph, 2)
    with pytest.warns(UserWarning, match="cannot be recorded .*not permitted"):
        graph.advance()
    loop.advance()
    assert graph.engine.name == "loop"
    assert "not permitted" in graph.engine.why
    run(loop, 20)
    run(graph, 20)
    torch.testing.assert_close(loop.phi, graph.phi, rtol=1e-9, atol=1e-9)
    strict = peeking(Graph(Recorder()), method)
    run(strict, 2)
    with pytest.raises(UsageError, match=r"engine graph: a step cannot be recorded .*; use engine=auto"):
        strict.advance()


def test_a_model_that_starts_to_draw_is_refused() -> None:
    graph = trainer(Graph(Recorder()))
    graph.advance()
    graph.learners[0].module.register_forward_hook(lambda module, inputs, out: out + 0.0 * torch.rand(()))
    with pytest.raises(UsageError, match="drew random numbers at inner step 2"):
        graph.advance()


class FakeStream:
    """Remembers for which streams it was made to wait."""

    def __init__(self, device: object) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The caller's stream, of a CUDA whose streams are fake."""
    current = FakeStream(None)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return current


def test_a_recording_waits_for_the_lanes_that_it_used_alone(main: FakeStream) -> None:
    """CUDA refuses a recording that waits for a stream outside it."""
    recorder = CudaRecorder(torch.device("cuda"), lanes=3)
    for rows in ((0, 1), (0, 1, 2, 2)):
        main.waited.clear()
        for row in rows:
            with recorder.lane(row):
                pass
        recorder.join()
        assert main.waited == recorder._lanes[: max(rows) + 1]
    assert all(set(lane.waited) == {main} for lane in recorder._lanes)


def test_a_recording_that_fails_leaves_the_callers_stream(main: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)

    def fail() -> None:
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(torch.device("cuda")).record(fail)
    assert chosen == [main]


def test_learners_with_large_batches_run_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 5 * (3 * 9 * 9 + 8)  # a label has 8 bytes
    for small, lanes in ((batch, LANES), (batch - 1, 1)):
        monkeypatch.setattr("trajshift.training.engines.cuda_graph.SMALL", small)
        assert lanes_for(trainer("loop").meta_step) == lanes


def test_cudnn_takes_repeatable_algorithms_for_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(cudnn, "benchmark", True)
    for device, inside in (("cuda", (True, False)), ("cpu", (False, True))):
        with repeatable(torch.device(device)):
            assert (cudnn.deterministic, cudnn.benchmark) == inside
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_the_tables_are_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajshift.training.engines.cuda_graph.AHEAD", 8)
    loop, graph = trainer("loop"), trainer(Graph(Recorder()))
    run(loop, 30)
    run(graph, 30)
    torch.testing.assert_close(loop.phi, graph.phi, rtol=1e-9, atol=1e-9)


def test_a_table_finds_its_keys_computed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a jump too, with the same tables as when all keys are computed at once."""
    monkeypatch.setattr("trajshift.training.engines.cuda_graph.AHEAD", 8)
    graph = run(trainer(Graph(Recorder())), 6)
    (feed, _), computed = graph.engine._feeds, []
    monkeypatch.setattr(feed, "look_ahead", lambda ahead=feed.look_ahead: (computed.append(len(feed._keys)), ahead()))
    run(graph, 2)
    assert computed == [6, 7]
    run(graph, 1)
    assert computed == [6, 7, 0]
    drawn = feed._draws.clone()
    feed.fill(40)
    assert len(computed) == 3 + 8
    assert not torch.equal(drawn, feed._draws)
    feed.fill(8)
    assert torch.equal(drawn, feed._draws)


def test_the_costliest_learners_start_first_on_lanes_of_equal_work() -> None:
    """The paper's eight sources."""
    pixels = [size * size for size in (64, 64, 32, 84, 84, 84, 28, 32)]
    launches = longest_first(pixels, 4)
    assert [pixels[row] for row, _ in launches] == sorted(pixels, reverse=True)
    loads = [sum(pixels[row] for row, lane in launches if lane == one) for one in range(4)]
    assert sorted(loads) == [7840, 8080, 8080, 8192]
    assert [lane for _, lane in longest_first(pixels, 8)] == list(range(8))
    graph = run(trainer(Graph(Recorder())), 1)
    assert [row for row, _ in graph.engine._launches] == [1, 0]


@pytest.mark.parametrize("stop", [12, 17])
def test_a_checkpoint_goes_on_in_either_engine(stop: int, tmp_path: Path) -> None:
    whole = run(trainer("loop"), 30)
    first = run(trainer(Graph(Recorder())), stop)
    save(tmp_path, first.meta_step)
    for engine in ("loop", Graph(Recorder())):
        second = trainer(engine)
        load(tmp_path / f"{stop:09d}", second.meta_step)
        run(second, 30 - stop)
        torch.testing.assert_close(whole.phi, second.phi, rtol=1e-9, atol=1e-9)


def test_a_loss_that_is_not_finite_is_named() -> None:
    graph = run(trainer(Graph(Recorder()), horizon=30), 8)
    graph.learners[1].own["fc.weight"].data.fill_(torch.inf)
    run(graph, 3)
    with pytest.raises(UsageError, match="task 'large' is not finite at inner step 9"):
        graph.check_finite()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "leap"}, "meta-gradient path_length"),
        ({"method": "accurate"}, "carry replay"),
        ({"method": "random-shifting"}, "carry random"),
        ({"renew": ("optimizer",)}, "each round has new learners"),
        ({"tasks_per_round": 1}, "each round has new learners"),
        ({"inner": Inner(optimizer="adafactor")}, "optimizer adafactor is not one fused kernel"),
        ({"meta_optimizer": "adam"}, "is not one fused kernel"),
        ({}, None),
        ({"method": "mtl"}, None),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_says_why(options: dict[str, Any], reason: str | None) -> None:
    found = Graph.obstacle(trainer("loop", **options).meta_step)
    assert found is None if reason is None else reason in str(found)


def test_sources_must_lie_on_the_device() -> None:
    plain = make("trajectory-shifting", image_tasks((2, 3)), partial(ConvNet))
    assert Graph.obstacle(plain.meta_step) is None
    listed = [Task(name="list", train=[(torch.zeros(1, 6, 6).double(), 0)] * 6, outputs=2)]
    assert "not held on the device" in str(Graph.obstacle(make("trajectory-shifting", listed).meta_step))
    own = [Task(name="own", train=image_tasks((2,))[0].train, outputs=2, transform=lambda batch, key: batch)]
    assert "transform of task 'own'" in str(Graph.obstacle(make("trajectory-shifting", own).meta_step))
    with pytest.raises(UsageError, match="engine graph cannot run this: it is for CUDA and the device is cpu"):
        choose_engine("graph", plain.meta_step)
