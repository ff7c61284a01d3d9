"""One contract that every preset keeps in every engine, on small tasks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.learners import (
    DOUBLE,
    ConvNet,
    SideBySide,
    Text,
    everything,
    image_data,
    image_tasks,
    make,
    named_theta,
    run,
    same_bits,
    text_tasks,
)
from tests.helpers.recording import Recorder
from trajshift import METHODS, Inner, MetaTrainer, Task
from trajshift.training.checkpoint import load, save
from trajshift.training.engines import choose
from trajshift.training.engines.cuda_graph import Graph
from trajshift.training.engines.loop import Engine
from trajshift.training.meta_step import MetaStep

every_preset = pytest.mark.parametrize("method", METHODS)
Dropout = partial(ConvNet, dropout=0.4)


def recorded(step: MetaStep) -> Engine | str:
    """The graph engine on the CPU, where nothing is in its way."""
    return Graph.obstacle(step) or choose._draws(step) or Graph(Recorder())


@pytest.fixture(autouse=True, params=["loop", "parallel", "graph"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `auto` chooses for a mix; one that the engine cannot run stays with the loop."""
    if request.param == "parallel":
        torch.set_num_threads(2)
        monkeypatch.setattr(choose, "Parallel", SideBySide)
    elif request.param == "graph":
        monkeypatch.setattr(choose, "_parallel", recorded)
    yield
    torch.set_num_threads(1)


@every_preset
def test_every_engine_has_its_mixes(method: str, request: pytest.FixtureRequest) -> None:
    chosen = make(method, image_tasks()).engine.name
    unrecorded = {"random-shifting", "accurate", "leap", "imaml"}
    able = {"loop": False, "parallel": not METHODS[method].single, "graph": method not in unrecorded}
    asked = request.node.callspec.params["engine"]
    assert chosen == (asked if able[asked] else "loop")


@every_preset
def test_two_runs_give_the_same_bits_and_another_seed_other_ones(method: str) -> None:
    first, second, other = (run(make(method, image_tasks(), Dropout, seed=seed)) for seed in (3, 3, 4))
    assert same_bits(everything(first), everything(second))
    assert first.initialization.to_bytes() == second.initialization.to_bytes()
    assert not torch.equal(first.phi, other.phi)
    assert torch.isfinite(first.phi).all()


@every_preset
def test_phi_moves_and_every_task_learns_with_its_own_head(method: str) -> None:
    trainer = make(method, image_tasks((2, 3, 5)))
    before = trainer.initialization
    run(trainer)
    after = trainer.initialization
    idle = {"body.0.bias"}  # BatchNorm takes it out again
    assert all(not torch.equal(before[name], after[name]) for name in before.keys() - idle)
    assert [tuple(learner.own["fc.weight"].shape) for learner in trainer.learners] == [
        (n, 16) for n in ((2,) if METHODS[method].single else (2, 3, 5))
    ]
    assert not any(name.startswith("fc") for name in after)


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_dtype_and_device_are_kept(method: str, dtype: torch.dtype) -> None:
    trainer = make(method, image_tasks(), partial(ConvNet, dtype=dtype))
    losses = [event.losses for event in trainer]
    tensors = [*everything(trainer).values(), *losses, *trainer.initialization.values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    for learner in trainer.learners:
        assert {parameter.dtype for parameter in learner.module.parameters()} == {dtype}


@every_preset
@pytest.mark.parametrize("stop", [4, 6], ids=["round boundary", "mid-round"])
def test_a_checkpoint_continues_with_the_same_bits(method: str, stop: int, tmp_path: Path) -> None:
    again(tmp_path, stop, partial(make, method, image_tasks(), Dropout, horizon=4, rounds=3))


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "trajectory-shifting", "tasks_per_round": 2},
        {"method": "reptile", "tasks_per_round": 1, "renew": ("heads",)},
        {"method": "trajectory-shifting", "meta_optimizer": "adam", "meta_lr": 0.01},
        {"method": "leap", "carry": "shift", "meta_every": 2},
        {"method": "leap", "metagrad_options": {"loss": False}},
        {"method": "accurate", "inner": Inner(optimizer="adam"), "renew": ("heads", "statistics", "optimizer")},
        {"method": "trajectory-shifting", "inner": Inner(optimizer="adafactor", schedule="cosine")},
        {"method": "trajectory-shifting", "inner": Inner(options={"momentum": 0.9}, flat=True)},
        {"method": "random-shifting", "inner": Inner(optimizer="asgd", options={"t0": 1.0})},
        {"method": "mtl", "inner": Inner(optimizer="nadam"), "tasks_per_round": 2},
    ],
    ids=str,
)
def test_a_checkpoint_continues_other_mixes_too(options: dict, stop: int, tmp_path: Path) -> None:
    options = dict(options)
    again(tmp_path, stop, partial(make, options.pop("method"), image_tasks(), Dropout, horizon=4, rounds=3, **options))


def again(directory: Path, stop: int, build: partial[MetaTrainer]) -> None:
    """Compares a run that was cut at `stop` and resumed with one that was not."""
    whole, first = build(), build()
    run(whole)
    run(first, stop)
    save(directory, first.meta_step, {"note": "kept"})
    first.phi.fill_(torch.nan)
    second = build()
    assert load(directory / f"{stop:09d}", second.meta_step) == {"note": "kept"}
    assert second.step == stop
    run(second)
    assert same_bits(everything(whole), everything(second))
    assert whole.initialization.to_bytes() == second.initialization.to_bytes()
    assert whole.metrics() == second.metrics()


@every_preset
def test_one_task(method: str) -> None:
    trainer = run(make(method, image_tasks((3,))))
    assert trainer.theta.shape[0] == 1
    assert trainer.phi.isfinite().all()


@every_preset
def test_many_tasks_a_few_at_a_time(method: str) -> None:
    if METHODS[method].single:
        pytest.skip("one task only")
    tasks = image_tasks((2, 3, 4, 5, 2, 3, 4))
    trainer = make(method, tasks, tasks_per_round=3, horizon=2, rounds=6)
    rounds = {}
    for event in trainer:
        rounds.setdefault(event.round, event.tasks)
        assert event.tasks == rounds[event.round]
        assert trainer.theta.shape[0] == len(event.tasks) == 3
    assert len(set(rounds.values())) > 2
    assert len({name for names in rounds.values() for name in names}) > 4
    other = make(method, tasks, tasks_per_round=3, horizon=2, rounds=6)
    assert [event.tasks for event in other][::2] == list(rounds.values())
    assert torch.equal(trainer.phi, other.phi)


@every_preset
def test_tied_weights_an_lstm_and_dict_batches(method: str) -> None:
    trainer = make(method, text_tasks(), Text)
    names = [entry.name for entry in trainer.layout.entries]
    assert "embedding.weight" in names
    assert "decoder.weight" not in names  # one parameter, once in the row
    run(trainer)
    for learner in trainer.learners:
        module = learner.module
        assert module.decoder.weight is module.embedding.weight
        assert module.decoder.weight.data_ptr() == learner.shared["embedding.weight"].data_ptr()
        assert torch.equal(named_theta(trainer, learner.task.name)["embedding.weight"], module.decoder.weight)
        batch = learner.batches.train(0)
        assert learner.task.compute_loss(module, batch).isfinite()
    start = make(method, text_tasks(), Text).initialization
    assert all(not torch.equal(start[name], tensor) for name, tensor in trainer.initialization.items())


class HalfFrozen(ConvNet):
    """Its convolution is frozen."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.body[0].requires_grad_(False)


@every_preset
def test_frozen_parameters_exist_once_and_stay(method: str) -> None:
    trainer = make(method, image_tasks(), HalfFrozen)
    run(trainer, 1)
    weights = [learner.module.body[0].weight for learner in trainer.learners]
    before = weights[0].clone()
    run(trainer)
    assert len({weight.data_ptr() for weight in weights}) == 1
    assert torch.equal(weights[0], before)
    assert torch.equal(trainer.initialization["body.0.weight"], before)
    assert not any("body.0" in name for learner in trainer.learners for name in learner.own_tensors())


class Optional(ConvNet):
    """Task `images1` has no use for `extra`."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.extra = nn.Parameter(torch.randn(3, dtype=DOUBLE))
        self.used = task.name != "images1"

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.extra.square().sum() * out if self.used else out


@every_preset
def test_a_parameter_that_a_task_does_not_use_does_not_decay(method: str) -> None:
    chosen = METHODS[method]
    tasks = image_tasks()[1:] if chosen.single else image_tasks()
    inner = Inner(lr=0.05, options={"momentum": 0.9, "weight_decay": 0.5})
    trainer = make(method, tasks, Optional, inner=inner, horizon=3, rounds=2)
    start = trainer.initialization["extra"]
    for event in trainer:
        if event.k == 1:
            at_reset, travelled = start, 0.0
        phi = trainer.initialization["extra"]
        theta = named_theta(trainer, "images1")["extra"]
        shifted = event.k < 3 and event.meta_updated
        if chosen.carry in ("shift", "replay") and shifted:
            torch.testing.assert_close(theta, phi, rtol=1e-12, atol=1e-13)
        elif chosen.carry == "hold":
            assert torch.equal(theta, at_reset)
        elif chosen.carry == "random" and shifted:
            travelled += float(trainer.meta_step.counters.update_norm)
            assert torch.linalg.vector_norm(theta - at_reset) <= travelled
        if event.k == 3:
            start = phi
    if not chosen.single and chosen.adapt == "all":
        unused = trainer.learners[1]
        assert not unused.optimizer.state[unused.shared["extra"]]["momentum_buffer"].any()


@every_preset
def test_the_users_generator_is_untouched(method: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    trainer = make(method, image_tasks(), Dropout)
    assert torch.equal(torch.random.get_rng_state(), before)
    for _ in trainer:
        assert torch.equal(torch.random.get_rng_state(), before)
    trainer.metrics()
    torch.manual_seed(6)  # nor does it matter
    assert torch.equal(run(make(method, image_tasks(), Dropout)).phi, trainer.phi)


@every_preset
def test_what_rows_held_before_a_reset_has_no_effect(method: str) -> None:
    clean, poisoned = (make(method, image_tasks(), Optional, horizon=3, rounds=3) for _ in range(2))
    for _ in range(3):
        run(clean, 3)
        run(poisoned, 3)
        poisoned.theta.fill_(torch.nan)
        if poisoned.meta_step.active.keep_gradients:
            poisoned.meta_step.active.gradients[:, poisoned.layout.mask(poisoned.device)] = torch.nan
    assert torch.equal(clean.phi, poisoned.phi)


@every_preset
@pytest.mark.parametrize("head_grows", [True, False], ids=["anil or not", "no own body"])
def test_adapters_on_a_frozen_body_shared_by_pattern(method: str, head_grows: bool) -> None:
    class Adapted(nn.Module):
        def __init__(self, task: Task) -> None:
            super().__init__()
            self.trunk = nn.Linear(36, 8, dtype=DOUBLE).requires_grad_(False)
            self.adapter = nn.Sequential(nn.Linear(8, 2, dtype=DOUBLE), nn.Linear(2, 8, dtype=DOUBLE))
            self.norm = nn.LayerNorm(8, dtype=DOUBLE).requires_grad_(head_grows)
            self.fc = nn.Linear(8, task.outputs, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.trunk(x.flatten(1)))
            return self.fc(self.norm(h + self.adapter(h)))

    trainer = make(method, image_tasks(), Adapted, shared=["adapter.*"])
    start = trainer.initialization
    run(trainer)
    adapters = {"adapter.0.weight", "adapter.0.bias", "adapter.1.weight", "adapter.1.bias"}
    frozen = {"trunk.weight", "trunk.bias"} | (set() if head_grows else {"norm.weight", "norm.bias"})
    assert set(start) == adapters | frozen
    assert {name for name, t in trainer.initialization.items() if not torch.equal(start[name], t)} == adapters
    assert len({learner.module.trunk.weight.data_ptr() for learner in trainer.learners}) == 1
    own = {"norm.weight", "norm.bias"} if head_grows else set()
    assert all(learner.own.keys() == {"fc.weight", "fc.bias"} | own for learner in trainer.learners)


class Stemmed(nn.Module):
    """A stem for the task's channels, which not all tasks can share, and a body that they do."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1, dtype=DOUBLE)
        self.stem = nn.Conv2d(task.input_shape[0], 4, 3, padding=1, dtype=DOUBLE)
        self.fc = nn.Linear(4, task.outputs, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


@every_preset
def test_images_of_different_size_channels_and_classes_in_one_run(method: str) -> None:
    tasks = [
        Task(name=f"c{c}", train=image_data(9 + c, n, size, c), outputs=n, input_shape=(c, size, size))
        for c, size, n in ((3, 5, 2), (1, 8, 4), (2, 6, 3))
    ]
    trainer = run(make(method, tasks, Stemmed))
    if METHODS[method].single:
        assert "stem.weight" in trainer.initialization
    else:
        assert set(trainer.initialization) == {"body.weight", "body.bias", "stem.bias"}
        assert [learner.own["stem.weight"].shape[1] for learner in trainer.learners] == [3, 1, 2]
    assert trainer.phi.isfinite().all()


@every_preset
def test_another_task_changes_neither_the_first_phi_nor_any_head_or_batch(method: str) -> None:
    if METHODS[method].single:
        pytest.skip("one task only")
    few, many = (make(method, image_tasks(n)) for n in ((2, 3), (2, 3, 5)))
    assert torch.equal(few.phi, many.phi)
    for event, other in zip(few, many, strict=True):
        if event.step == 1:
            assert torch.equal(event.losses, other.losses[:2])
    for a, b in zip(few.learners, many.learners, strict=False):
        assert torch.equal(a.batches.indices(1000), b.batches.indices(1000))
