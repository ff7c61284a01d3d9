"""Frozen parameters and buffers that are no statistics: whose they are, and where they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trajshift import MetaTrainer, Task, UsageError, finetune, load_initialization
from trajshift.learners.pretrained import load_start
from trajshift.training.checkpoint import load, save


def make_task(name: str, seed: int, outputs: int = 3) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 8, generator=generator)
    y = (x @ torch.randn(8, outputs, generator=generator)).argmax(1)
    return Task(name=name, train=(x, y), test=(x, y), outputs=outputs, input_shape=(8,))


TASKS = [make_task("a", 1), make_task("b", 2)]


class Stem(nn.Module):
    """A frozen layer below the trained one."""

    def __init__(self, task: Task, frozen: bool = True) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, task.outputs or 2)
        self.stem.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


class Features(nn.Module):
    """Random features, kept as a frozen parameter or as a buffer; the head is drawn before them."""

    def __init__(self, task: Task, buffer: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(16, task.outputs or 2)
        drawn = torch.randn(8, 16)
        if buffer:
            self.register_buffer("b", drawn)
        else:
            self.b = nn.Parameter(drawn, requires_grad=False)
        self.body = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.sin(x @ self.b))))


class Centred(Stem):
    """Each task has a constant of its own, frozen or a buffer."""

    def __init__(self, task: Task, buffer: bool = False) -> None:
        super().__init__(task, frozen=False)
        mean = torch.full((8,), {"a": 5.0, "b": -5.0}.get(task.name, 1.0))
        if buffer:
            self.register_buffer("mean", mean)
        else:
            self.mean = nn.Parameter(mean, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


class Teacher(nn.Module):
    """An average of the trained weights, changed in every training pass behind autograd's back."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, task.outputs or 2)
        self.teacher = nn.Parameter(torch.zeros(16, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.teacher.data.lerp_(self.body.weight.data, 0.1)
        return self.head(torch.relu(self.body(x)) + torch.relu(x @ self.teacher.T))


def train(model: Callable[[Task], nn.Module], tasks: list[Task] = TASKS, **options: Any) -> MetaTrainer:
    chosen: dict[str, Any] = {"horizon": 4, "rounds": 4, "batch_size": 8, "seed": 3}
    return MetaTrainer(model, tasks, options.pop("method", "reptile"), **(chosen | options))


def losses(trainer: MetaTrainer, until: int | None = None) -> list[list[float]]:
    stop = trainer.total_steps if until is None else until
    return [trainer.advance().losses.tolist() for _ in range(stop - trainer.step)]


def of_each(trainer: MetaTrainer, name: str) -> list[Tensor]:
    return [learner.module.get_parameter(name).data for learner in trainer.learners]


@pytest.fixture
def published() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return Stem(TASKS[0], frozen=False).state_dict()


def test_a_frozen_stem_has_the_published_weights_everywhere(published: dict[str, Tensor], tmp_path: Path) -> None:
    want = published["stem.weight"]
    trainer = train(Stem, initialization=published)
    losses(trainer)
    assert all(torch.equal(weight, want) for weight in of_each(trainer, "stem.weight"))
    assert torch.equal(trainer.initialization["stem.weight"], want)
    tuned = finetune(published, TASKS[0], model=Stem, steps=3, batch_size=8, seed=8)
    assert torch.equal(tuned.module.get_parameter("stem.weight"), want)
    assert "stem.weight" in tuned.started_from
    assert torch.equal(load_start(tuned.save(tmp_path / "tuned.safetensors"))["stem.weight"], want)
    # from the saved phi, without the published file
    file = trainer.initialization.save(tmp_path / "phi.safetensors")
    again = finetune(load_initialization(file), make_task("c", 9), model=Stem, steps=1, batch_size=8, seed=11)
    assert torch.equal(again.module.get_parameter("stem.weight"), want)
    module = Stem(TASKS[0])
    assert load_initialization(file, module).matched
    assert torch.equal(module.stem.weight, want)


def test_a_frozen_parameter_of_another_shape_is_refused_by_name(published: dict[str, Tensor]) -> None:
    published["stem.weight"] = torch.zeros(16, 9)
    with pytest.raises(UsageError, match=r"stem\.weight \(16, 9\), not \(16, 8\)"):
        train(Stem, initialization=published)
    with pytest.raises(UsageError, match=r"'stem\.weight' with shape \(16, 9\)"):
        finetune(published, TASKS[0], model=Stem, steps=0)


@pytest.mark.parametrize("buffer", [False, True])
def test_random_features_are_one_draw_for_all_tasks_and_for_fine_tuning(buffer: bool, tmp_path: Path) -> None:
    def model(task: Task) -> nn.Module:
        return Features(task, buffer)

    # Two numbers of outputs: the draws before the features differ between tasks.
    trainer = train(model, [make_task("a", 1, 3), make_task("b", 2, 5)])
    losses(trainer)
    first, second = (learner.module.state_dict()["b"] for learner in trainer.learners)
    assert torch.equal(first, second)
    assert first.std() > 0.5
    phi = load_initialization(trainer.initialization.save(tmp_path / "phi.safetensors"))
    for seed in (3, 4):
        tuned = finetune(phi, make_task("c", 7, 4), model=model, steps=2, batch_size=8, seed=seed)
        assert torch.equal(tuned.module.state_dict()["b"], first)
    assert not torch.equal(train(model, seed=4).initialization["b"], first)
    # A run resumes with the values of its checkpoint; a task that joins takes them.
    saved = save(tmp_path, trainer.meta_step)
    new = train(model, [make_task("a", 1, 3), make_task("z", 4, 2)])
    load(saved, new.meta_step)
    assert torch.equal(new.initialization["b"], first)
    new.rounds += 1
    losses(new)
    assert all(torch.equal(learner.module.state_dict()["b"], first) for learner in new.learners)


@pytest.mark.parametrize("buffer", [False, True])
def test_a_constant_that_the_factory_sets_per_task_stays_with_its_task(buffer: bool, tmp_path: Path) -> None:
    def model(task: Task) -> nn.Module:
        return Centred(task, buffer)

    trainer = train(model)
    losses(trainer, 5)
    values = {learner.task.name: float(learner.module.state_dict()["mean"][0]) for learner in trainer.learners}
    assert values == {"a": 5.0, "b": -5.0}
    assert "mean" not in trainer.initialization
    tuned = finetune(trainer.initialization, make_task("c", 3), model=model, steps=0)
    assert float(tuned.module.state_dict()["mean"][0]) == 1.0
    resumed = train(model)
    load(save(tmp_path, trainer.meta_step), resumed.meta_step)
    assert losses(resumed) == losses(trainer)


def test_a_constant_equal_in_the_runs_tasks_does_not_override_another_tasks_own() -> None:
    trainer = train(Centred, [make_task("c", 3), make_task("d", 4)])
    losses(trainer)
    assert float(trainer.initialization["mean"][0]) == 1.0
    tuned = finetune(trainer.initialization, TASKS[0], model=Centred, steps=0)
    assert float(tuned.module.get_parameter("mean")[0]) == 5.0


def test_equal_frozen_parameters_are_stored_once() -> None:
    trainer = train(Stem)
    losses(trainer, 1)
    first, second = of_each(trainer, "stem.weight")
    assert first.data_ptr() == second.data_ptr()


def test_a_teacher_belongs_to_its_task_and_is_in_the_checkpoint(tmp_path: Path) -> None:
    whole, alone = losses(train(Teacher)), losses(train(Teacher, TASKS[:1]))
    assert [row[0] for row in whole[:4]] == [row[0] for row in alone[:4]]
    trainer = train(Teacher)
    losses(trainer, 6)  # in the middle of a round
    resumed = train(Teacher)
    load(save(tmp_path, trainer.meta_step), resumed.meta_step)
    assert losses(resumed) == whole[6:]
    first, second = of_each(resumed, "teacher")
    assert not torch.equal(first, second)


def test_extra_passes_do_not_move_a_teacher() -> None:
    trainer = train(Teacher, TASKS[:1], method="imaml", rounds=1)
    want, body = torch.zeros(16, 8), trainer.initialization["body.weight"]
    for _ in range(trainer.total_steps):
        want = want.lerp(body, 0.1)  # one training pass for each inner step, those of the Hessian not counted
        trainer.advance()
        assert torch.equal(of_each(trainer, "teacher")[0], want)
        body = of_each(trainer, "body.weight")[0].clone()


def test_a_late_change_of_a_shared_frozen_parameter_is_refused() -> None:
    class Late(Stem):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Late.calls += 1
            if Late.calls > 6:
                self.stem.bias.data.add_(0.01)
            return super().forward(x)

    with pytest.raises(UsageError, match=r"frozen parameter 'stem\.bias', which all tasks share, changed"):
        losses(train(Late))


def test_a_checkpoint_without_constants_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions before wrote them: neither constants nor a task's own frozen parameters."""
    from trajshift.training import checkpoint

    trainer = train(Centred)
    losses(trainer, 8)
    pack = checkpoint._pack
    old = ("constant/", "frozen/")
    monkeypatch.setattr(checkpoint, "_pack", lambda t: pack({n: v for n, v in t.items() if not n.startswith(old)}))
    saved = save(tmp_path, trainer.meta_step)
    resumed = train(Centred)
    load(saved, resumed.meta_step)
    assert losses(resumed) == losses(trainer)
