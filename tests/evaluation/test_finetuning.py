"""Fine-tuning against a plain PyTorch loop in float64, its starts, its BatchNorm statistics and its errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.evaluation.finetuning import finetune
from trajshift.learners.initialization import Initialization, load_initialization
from trajshift.rng import generator_seed, key, permutation
from trajshift.task import Task

SEED, BATCH, STEPS = 5, 6, 20


class Net(nn.Module):
    def __init__(self, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(F.softplus(self.norm(self.conv(x))).mean((2, 3))))


def factory(task: Task) -> nn.Module:
    return Net(task.outputs or 1)


def examples(n: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64) + y[:, None, None, None]
    return x, y


def make_task(**changes: Any) -> Task:
    fields: dict[str, Any] = {"name": "target", "train": examples(20, 0), "test": examples(13, 1), "outputs": 3}
    return Task(**(fields | {"input_shape": (2, 5, 5)} | changes))


def body(seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = {name: p.detach() for name, p in Net(3).double().named_parameters() if not name.startswith("fc")}
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


def tune(initialization: Any = None, task: Task | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "model": factory,
        "steps": STEPS,
        "batch_size": BATCH,
        "seed": SEED,
        "dtype": torch.float64,
    }
    return finetune(initialization, task or make_task(), **(options | changes))


def drawn(make: Callable[[], nn.Module], *parts: int | str) -> nn.Module:
    torch.manual_seed(generator_seed(key(*parts)))
    return make()


def plain_loop(
    start: nn.Module, lr_at: Callable[[int], float], steps: int, *, dropout_seeds: bool = False
) -> nn.Module:
    """The published meta-test without any of the library but its two documented draws (order, dropout)."""
    x, y = examples(20, 0)
    order = torch.cat([permutation(key(SEED, "target", "train", epoch), 20) for epoch in range(10)])
    optimizer = torch.optim.SGD(start.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    start.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        chosen = order[step * BATCH : (step + 1) * BATCH]
        if dropout_seeds:
            torch.manual_seed(generator_seed(key(SEED, "target", "forward", step)))
        optimizer.zero_grad()
        F.cross_entropy(start(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return start.eval()


def published_lr(step: int) -> float:
    return 0.1 * 0.3 ** ((step >= 8) + (step >= 14) + (step >= 18))  # 0.4, 0.7 and 0.9 of 20 steps


def start_from(tensors: dict[str, Tensor], dropout: float = 0.0) -> nn.Module:
    module = drawn(lambda: Net(3, dropout), SEED, "target", "head", 0).double()
    state = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    return module


def assert_same(module: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    expected = other.state_dict()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


# -- against the plain loop ----------------------------------------------------------------------------------------


def test_equals_the_plain_loop_in_float64() -> None:
    tuned = tune(body())
    expected = plain_loop(start_from(body()), published_lr, STEPS)
    assert_same(tuned.module, expected)
    x, y = examples(13, 1)
    with torch.no_grad():
        logits = expected(x)
    assert tuned.metrics["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item(), abs=1e-7)
    assert tuned.metrics["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-12)
    assert tuned.images == 20
    assert tuned.fresh == ("fc.weight", "fc.bias")
    assert tuned.started_from == ("conv.weight", "conv.bias", "norm.weight", "norm.bias")


def test_dropout_draws_by_seed_task_and_step() -> None:
    phi, before = body(), torch.get_rng_state()
    tuned = tune(phi, model=lambda task: Net(3, 0.5))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(tuned.module, plain_loop(start_from(body(), 0.5), published_lr, STEPS, dropout_seeds=True))


def test_schedules_and_optimizers() -> None:
    constant = tune(body(), schedule="constant")
    assert_same(constant.module, plain_loop(start_from(body()), lambda step: 0.1, STEPS))
    cosine = tune(body(), schedule="cosine")
    half = plain_loop(start_from(body()), lambda step: 0.05 * (1 + math.cos(math.pi * step / STEPS)), STEPS)
    assert_same(cosine.module, half)
    adam = tune(body(), optimizer="adam", lr=0.01)  # no momentum argument reaches it
    assert adam.curve[-1]["train_loss"] < adam.curve[0]["train_loss"]
    with pytest.raises(UsageError, match="LBFGS is refused"):
        tune(body(), optimizer="lbfgs")


def test_scratch_starts_from_the_phi_of_the_seed() -> None:
    start = drawn(lambda: Net(3), SEED, "target", "head", 0).double()
    phi = drawn(lambda: Net(3), SEED, "phi").double()
    start.conv.load_state_dict(phi.conv.state_dict())
    tuned = tune(None)
    assert tuned.started_from == ()
    assert_same(tuned.module, plain_loop(start, published_lr, STEPS))


def test_a_start_is_the_same_whatever_was_drawn_before_and_the_same_head_for_all() -> None:
    first = tune(body(1), steps=0).module.state_dict()
    torch.manual_seed(99)
    second = tune(body(2), steps=0).module.state_dict()
    assert torch.equal(first["fc.weight"], second["fc.weight"])
    assert not torch.equal(first["conv.weight"], second["conv.weight"])
    other_task = tune(body(1), make_task(name="other"), steps=0).module.state_dict()
    assert not torch.equal(first["fc.weight"], other_task["fc.weight"])
    other_seed = tune(body(1), steps=0, seed=6).module.state_dict()
    assert not torch.equal(first["fc.weight"], other_seed["fc.weight"])


def test_frozen_parameters_stay() -> None:
    def frozen(task: Task) -> nn.Module:
        module = Net(3)
        module.conv.requires_grad_(False)
        return module

    phi = {name: tensor for name, tensor in body().items() if not name.startswith("conv")}
    tuned = tune(phi, model=frozen)
    expected = drawn(lambda: Net(3), SEED, "phi").double().conv.weight
    torch.testing.assert_close(tuned.module.conv.weight, expected)
    assert not any(name.startswith("conv") for name in tuned.fresh)


def test_initialization_from_a_file_and_a_trainer_like_object(tmp_path: Path) -> None:
    phi = Initialization(body(), {"heads": ["fc"]}, model=factory)
    path = phi.save(tmp_path / "phi.safetensors")
    expected = tune(phi, model=None)
    assert_same(tune(load_initialization(path)).module, expected.module, 0.0)
    with pytest.raises(UsageError, match="needs model="):
        tune(load_initialization(path), model=None)
    saved = load_file(expected.save(tmp_path / "tuned.safetensors"))
    assert torch.equal(saved["conv.weight"], expected.module.conv.weight)


def test_a_whole_state_dict_as_initialization_gets_a_fresh_head() -> None:
    state = Net(7).double().state_dict()
    tuned = tune(state, steps=0)
    assert tuned.module.fc.weight.shape == (3, 4)
    assert torch.equal(tuned.module.conv.weight, state["conv.weight"])


def test_a_module_as_the_model() -> None:
    tuned = tune(body(), model=Net(7).double(), head="fc", steps=1)
    assert tuned.module.fc.out_features == 3


# -- few data ------------------------------------------------------------------------------------------------------


def test_the_subset_is_balanced_and_the_same_for_every_initialization(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["trajshift.evaluation.finetuning"]
    seen: list[Tensor] = []
    original = module.subset

    def spy(source: Any, indices: Tensor) -> Any:
        seen.append(indices)
        return original(source, indices)

    monkeypatch.setattr(module, "subset", spy)
    assert tune(body(1), train_images=7, steps=1).images == 7
    tune(None, train_images=7, steps=1)
    tune(body(1), train_images=4, steps=1)
    tune(body(1), train_images=7, steps=1, seed=6)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:4], seen[2])
    assert not torch.equal(seen[0], seen[3])
    assert sorted(torch.bincount(examples(20, 0)[1][seen[0]]).tolist()) == [2, 2, 3]
    more = tune(body(1), train_images=1000)
    assert more.images == 20
    assert_same(more.module, tune(body(1)).module, 0.0)


class Folder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = examples(n, seed)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])


def test_a_map_style_data_set_with_and_without_workers() -> None:
    expected = tune(body())
    for workers in (0, 1):
        tuned = tune(body(), make_task(train=Folder(20, 0), test=Folder(13, 1)), workers=workers)
        assert_same(tuned.module, expected.module, 0.0)
        assert tuned.metrics == expected.metrics
    assert tune(body(), make_task(train=Folder(20, 0)), train_images=7, steps=1).images == 7


# -- BatchNorm statistics ------------------------------------------------------------------------------------------


def test_reset_starts_with_fresh_statistics() -> None:
    def pretrained(task: Task) -> nn.Module:
        module = Net(3)
        module.norm.running_mean.fill_(7.0)
        module.norm.num_batches_tracked.fill_(9)
        return module

    norm = tune(body(), model=pretrained, steps=0).module.norm
    assert norm.running_mean.tolist() == [0.0] * 4
    assert norm.running_var.tolist() == [1.0] * 4
    assert int(norm.num_batches_tracked) == 0
    kept = tune(body(), model=pretrained, steps=0, running_stats="keep").module.norm
    assert kept.running_mean.tolist() == [7.0] * 4
    one_step = tune(body(), model=pretrained, steps=1).module.norm
    assert int(one_step.num_batches_tracked) == 1


def test_keep_takes_the_initializations_statistics_or_says_there_are_none() -> None:
    statistics = {
        "norm.running_mean": torch.full((4,), 2.0, dtype=torch.float64),
        "norm.running_var": torch.full((4,), 3.0, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(11),
    }
    norm = tune(body() | statistics, steps=0, running_stats="keep").module.norm
    assert norm.running_mean.tolist() == [2.0] * 4
    assert norm.running_var.tolist() == [3.0] * 4
    assert int(norm.num_batches_tracked) == 11
    assert tune(body() | statistics, steps=0).module.norm.running_mean.tolist() == [0.0] * 4
    with pytest.raises(UsageError, match=r"has statistics for 'norm'.*recalibrate"):
        tune(body(), steps=0, running_stats="keep")


def test_recalibrate_averages_the_batch_statistics_of_the_start() -> None:
    norm = tune(body(), steps=0, running_stats="recalibrate", batch_size=10).module.norm
    x, _ = examples(20, 0)
    with torch.no_grad():
        before = start_from(body()).conv(x)
    # Two batches of ten make one pass, so the mean of the batch means is the mean over all images.
    torch.testing.assert_close(norm.running_mean, before.mean((0, 2, 3)))
    order = permutation(key(SEED, "target", "train", 0), 20)
    halves = [before[part].transpose(0, 1).flatten(1).var(1) for part in (order[:10], order[10:])]
    torch.testing.assert_close(norm.running_var, (halves[0] + halves[1]) / 2)
    assert norm.momentum == 0.1
    untouched = tune(body(), steps=0).module.state_dict()
    assert torch.equal(untouched["conv.weight"], body()["conv.weight"])


# -- curve, metrics, errors ------------------------------------------------------------------------------------------


def test_curve_and_progress() -> None:
    calls: list[tuple[int, int]] = []
    tuned = tune(body(), evaluate_every=10, progress=lambda done, steps: calls.append((done, steps)))
    assert calls == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert [point["step"] for point in tuned.curve] == list(range(1, 21))
    assert [point["step"] for point in tuned.curve if "accuracy" in point] == [10, 20]
    assert tuned.curve[-1]["accuracy"] == tuned.metrics["accuracy"]
    assert_same(tuned.module, tune(body()).module, 0.0)  # looking changes nothing
    long = tune(body(), steps=120)
    assert len(long.curve) == 60
    assert long.curve[0]["train_loss"] == pytest.approx(
        sum(p["train_loss"] for p in tune(body(), steps=2, schedule="constant").curve) / 2
    )


def test_regression_and_no_test_set() -> None:
    x, _ = examples(20, 0)
    y = x.mean((1, 2, 3))[:, None]
    task = make_task(train=(x, y), test=(x, y), outputs=1, kind="regression")
    tuned = tune(body(), task, steps=60, lr=0.05)
    with torch.no_grad():
        assert tuned.metrics["mse"] == pytest.approx(F.mse_loss(tuned.module(x), y).item())
    assert tuned.metrics["mse"] < y.var().item()
    assert tune(body(), make_task(test=None)).metrics == {}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_models_dtype_decides_not_that_of_the_start(stored: torch.dtype) -> None:
    phi = {name: tensor.to(stored) for name, tensor in body().items()}
    assert {p.dtype for p in tune(phi, dtype=None).module.parameters()} == {torch.float32}
    same_values = {name: tensor.float() for name, tensor in phi.items()}
    assert tune(phi, dtype=None).metrics == tune(same_values, dtype=None).metrics


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"running_stats": "resett"}, "did you mean 'reset'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"head": "nothing"}, "no head named 'nothing'"),
        ({"train_images": 0}, "at least 1"),
        ({"options": {"momentun": 1}}, "does not accept"),
    ],
)
def test_mistakes_are_said_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        tune(body(), **changes)


def test_initializations_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"'conv.weight' with shape \(4, 3, 3, 3\).*\(4, 2, 3, 3\)"):
        tune(body() | {"conv.weight": torch.zeros(4, 3, 3, 3)})
    with pytest.raises(UsageError, match=r"no place for 'layer1\.weight'"):
        tune(body() | {"layer1.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match="no place for any trainable parameter"):
        tune({})


def test_a_loss_that_is_not_finite_names_step_and_learning_rate() -> None:
    x, y = examples(20, 0)
    x[permutation(key(SEED, "target", "train", 0), 20)[7]] = math.inf  # in the second batch
    with pytest.raises(NonFiniteLoss, match=r"'target': the loss at step 2 is nan with learning rate 0\.1"):
        tune(body(), make_task(train=(x, y)))
