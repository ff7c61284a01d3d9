"""Engines give the numbers of the loop, and `auto` picks one that can."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.helpers.learners import ConvNet, SideBySide, Text, everything, image_tasks, make, run, same_bits, text_tasks
from tests.helpers.options import build
from trajshift import METHODS, Inner, MetaTrainer, Task, UsageError
from trajshift.data.augmentation import image_task
from trajshift.models import build_model
from trajshift.training.engines.loop import Engine
from trajshift.training.engines.parallel import Parallel
from trajshift.training.meta_step import MetaStep


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """What `auto` and `parallel` may use; the loop runs with one, as its bits depend on it."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class OneThread(Engine):
    """The loop with one thread."""

    def step(self, run: MetaStep) -> tuple[Tensor, bool]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().step(run)
        finally:
            torch.set_num_threads(before)


MIXES: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS if not METHODS[method].single),
    {"method": "trajectory-shifting", "tasks_per_round": 2, "renew": ("heads",)},
    {"method": "trajectory-shifting", "grad_clip": 0.5, "meta_optimizer": "adam", "meta_lr": 0.01},
    {"method": "leap", "carry": "shift", "meta_every": 2},
]


@pytest.mark.parametrize("options", MIXES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_side_by_side_is_the_loop_to_the_last_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = partial(ConvNet, dtype=dtype)
    both = [
        run(make(tasks=image_tasks((2, 3, 5)), model=model, rounds=3, engine=engine, **options))
        for engine in (OneThread(), SideBySide())
    ]
    assert same_bits(*map(everything, both))
    assert both[0].metrics() == both[1].metrics()


def test_augmented_resnets_of_several_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8, generator=generator) for size in (8, 12, 9)]
    tasks = [
        image_task(f"size {x.shape[-1]}", (x, torch.arange(20) % 4), outputs=4, crop_padding=2, flip=True)
        for x in images
    ]
    both = [
        run(
            build(
                partial(build_model, "resnet20", width=4),
                tasks,
                horizon=3,
                rounds=2,
                batch_size=6,
                engine=engine,
                inner=Inner(options={"momentum": 0.9}),
            )
        )
        for engine in (OneThread(), SideBySide())
    ]
    assert same_bits(*map(everything, both))


class Slow(Dataset[tuple[torch.Tensor, int]]):
    """A map-style data set that augments with the global generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 6, 6), float(index)).double() + torch.randn(1, 6, 6).double(), index % 3


@pytest.mark.parametrize("workers", [0, 1])
def test_sources_read_example_by_example(workers: int) -> None:
    tasks = [Task(name=f"slow{t}", train=Slow(), outputs=3) for t in range(3)]
    both = [run(make("trajectory-shifting", tasks, engine=engine)) for engine in (OneThread(), SideBySide())]
    again = run(make("trajectory-shifting", tasks, engine=SideBySide(), workers=workers))
    assert same_bits(*map(everything, both))
    assert same_bits(everything(both[0]), everything(again))


def test_every_learner_keeps_to_one_thread_of_several() -> None:
    seen: set[tuple[str, int]] = set()

    class Watched(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
            return super().forward(x)

    run(make("trajectory-shifting", image_tasks(), Watched, engine=SideBySide()), 2)
    assert seen == {("learner", 1)}
    assert torch.get_num_threads() == 2


def test_it_tries_both_ways_and_keeps_one() -> None:
    trainer = make("trajectory-shifting", image_tasks((2, 3)), engine="auto", horizon=20)
    assert isinstance(trainer.engine, Parallel)
    run(trainer, 7)
    assert trainer.engine.side_by_side is None
    run(trainer, 1)
    assert trainer.engine.side_by_side in (True, False)
    alone = make("trajectory-shifting", image_tasks((2, 3)), engine=OneThread(), horizon=20)
    assert same_bits(everything(run(trainer)), everything(run(alone)))


# -- which one -----------------------------------------------------------------------------------------------


def test_the_engine_is_chosen_again_when_tasks_join() -> None:
    def model(task: Task) -> nn.Module:
        return ConvNet(task, dropout=0.4 if task.name == "images2" else 0.0)

    tasks = image_tasks((2, 3, 5))
    trainer = run(make("trajectory-shifting", tasks[:2], model), 4)
    assert trainer.engine.name == "parallel"
    trainer.set_tasks(tasks)
    assert trainer.engine.name == "loop"
    assert "'images2' draws random numbers" in trainer.engine.why


def test_auto_says_why_it_stays_with_the_loop() -> None:
    def chosen(**options: Any) -> tuple[str, str]:
        about = make(**{"method": "trajectory-shifting", "tasks": image_tasks((2, 3)), **options}).describe()
        return about["engine"], about.get("engine_because", "")

    assert chosen() == ("parallel", "")
    assert chosen(engine="loop") == ("loop", "")
    assert chosen(tasks=text_tasks(), model=Text) == ("parallel", "")
    assert "draws random numbers" in chosen(model=partial(ConvNet, dropout=0.1))[1]
    assert chosen(tasks=image_tasks((2,)))[1] == "1 tasks do not fill 2 threads"
    assert chosen(tasks_per_round=1)[0] == "loop"
    torch.set_num_threads(1)
    assert chosen() == ("loop", "it needs 2 CPU threads and has 1")


@pytest.mark.parametrize(
    ("engine", "model", "sentence"),
    [
        ("paralel", ConvNet, "engine is 'paralel', which is unknown; did you mean 'parallel'"),
        ("parallel", partial(ConvNet, dropout=0.1), "engine parallel cannot run this: the model of task 'images0'"),
    ],
)
def test_an_engine_that_cannot_is_refused(engine: str, model: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?")):
        make("trajectory-shifting", image_tasks((2, 3)), model, engine=engine)


def test_numbers_drawn_now_and_then_are_found_out() -> None:
    class Sometimes(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.calls > 2:
                x = nn.functional.dropout(x, 0.5)
            self.calls += 1
            return super().forward(x)

        calls = 0

    with pytest.raises(UsageError, match="drew random numbers at inner step 4 and had not before; use engine=loop"):
        run(make("trajectory-shifting", image_tasks((2, 3)), Sometimes, engine=SideBySide()))


# -- layout and precision ------------------------------------------------------------------------------------


def resnets(**options: Any) -> MetaTrainer:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
    tasks = [image_task(name, (x, torch.arange(24) % n), outputs=n) for name, n in (("a", 2), ("b", 3))]
    chosen = {"horizon": 10, "rounds": 5, "batch_size": 8, "inner": Inner(lr=0.01, options={"momentum": 0.9})}
    return build(partial(build_model, "resnet20", width=4), tasks, **{**chosen, **options})


def test_convolutions_are_channels_last_unless_told_otherwise() -> None:
    for options, last in (({}, True), ({"channels_last": False}, False)):
        trainer = run(resnets(**options), 1)
        weight = dict(trainer.learners[1].module.named_parameters())["layer1.0.conv1.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
        assert trainer.describe()["channels_last"] is last
    assert make("reptile", image_tasks()).describe()["channels_last"] is False  # float64


def test_the_layout_changes_no_number_in_float64() -> None:
    def double(task: Task) -> nn.Module:
        return build_model("resnet20", task, width=4).double()

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, 8, 8, generator=generator, dtype=torch.float64)
    tasks = [Task(name=n, train=(x, torch.arange(24) % 3), outputs=3, input_shape=(3, 8, 8)) for n in "ab"]
    inner = Inner(options={"momentum": 0.9})
    ends = [
        run(build(double, tasks, horizon=10, rounds=5, batch_size=8, channels_last=last, inner=inner))
        for last in (True, False)
    ]
    assert ends[0].initialization.keys() == ends[1].initialization.keys()
    for name, tensor in ends[0].initialization.items():
        torch.testing.assert_close(tensor, ends[1].initialization[name], rtol=1e-9, atol=1e-9)


def test_bfloat16_passes_leave_the_state_in_float32() -> None:
    """A shift of 1e-3 of a small displacement is far below bfloat16's 8 bits: phi must not be kept in it."""
    trainer = run(resnets(autocast=torch.bfloat16, meta_lr=1e-3), 3)
    state = [
        value for learner in trainer.learners for value in learner.state()[0].values() if value.is_floating_point()
    ]
    assert {trainer.phi.dtype, trainer.theta.dtype, *(tensor.dtype for tensor in state)} == {torch.float32}
    before = trainer.phi.clone()
    run(trainer, 1)
    moved, mask = trainer.phi - before, trainer.layout.mask(trainer.phi.device)
    assert (moved[mask] != 0).float().mean() > 0.9
    lost = before.bfloat16() + moved.bfloat16() == before.bfloat16()
    assert lost[mask].float().mean() > 0.9
