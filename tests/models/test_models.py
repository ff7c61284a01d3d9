from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trajshift import models
from trajshift.errors import UsageError
from trajshift.task import Task

BUILT_IN = ("conv", "resnet20", "resnet32", "resnet44", "resnet56", "resnet18", "resnet34")


def image_task(outputs: int | None = 10, shape: tuple[int, ...] | None = (3, 32, 32), **fields: object) -> Task:
    return Task(name="task", train=None, outputs=outputs, input_shape=shape, **fields)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_names_are_the_documented_ones() -> None:
    assert set(models.names()) == set(BUILT_IN)


@pytest.mark.parametrize(
    ("name", "outputs", "parameters"),
    [
        # He et al. (2016), table 6, give 0.27M, 0.46M, 0.66M and 0.85M; these are the exact counts.
        ("resnet20", 10, 269_722),
        ("resnet32", 10, 464_154),
        ("resnet44", 10, 658_586),
        ("resnet56", 10, 853_018),
        # torchvision's model table.
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
    ],
)
def test_published_parameter_counts(name: str, outputs: int, parameters: int) -> None:
    assert count(models.build_model(name, image_task(outputs))) == parameters


def torchvision_keys(blocks: list[int]) -> list[str]:
    """The state-dict keys of torchvision's basic-block ResNets, in order."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *norm("bn1")]
    for stage, count_ in enumerate(blocks, start=1):
        for block in range(count_):
            prefix = f"layer{stage}.{block}"
            keys += [f"{prefix}.conv1.weight", *norm(f"{prefix}.bn1")]
            keys += [f"{prefix}.conv2.weight", *norm(f"{prefix}.bn2")]
            if stage > 1 and block == 0:
                keys += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", [2, 2, 2, 2]), ("resnet34", [3, 4, 6, 3])])
def test_torchvision_names_and_shapes(name: str, blocks: list[int]) -> None:
    state = models.build_model(name, image_task(1000)).state_dict()
    assert list(state) == torchvision_keys(blocks)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer2.0.conv1.weight"].shape == (128, 64, 3, 3)
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["fc.weight"].shape == (1000, 512)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "conv"])
def test_convolutions_are_drawn_with_kaiming_fan_out(name: str) -> None:
    torch.manual_seed(0)
    module = models.build_model(name, image_task())
    checked = 0
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 4000:
            expected = math.sqrt(2 / (part.out_channels * part.kernel_size[0] * part.kernel_size[1]))
            assert part.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert abs(part.weight.mean().item()) < 0.05 * expected
            checked += 1
    assert checked >= 2
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert all(bool((part.weight == 1).all() and (part.bias == 0).all()) for part in norms)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 7), (3, 16, 16), (1, 28, 33)])
def test_any_image_size_and_channel_count(name: str, shape: tuple[int, int, int]) -> None:
    module = models.build_model(name, image_task(7, shape)).eval()
    out = module(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "conv"])
def test_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    module = models.build_model(name, image_task(5, (3, 12, 12)))
    module(torch.randn(4, 3, 12, 12)).square().mean().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "conv"])
def test_body_does_not_depend_on_the_number_of_classes_or_the_image_size(name: str) -> None:
    states = []
    for outputs, shape in [(2, (3, 8, 8)), (100, (3, 64, 48))]:
        torch.manual_seed(3)
        states.append(models.build_model(name, image_task(outputs, shape)).state_dict())
    small, large = states
    assert list(small) == list(large)
    body = [key for key in small if not key.startswith("fc.")]
    assert len(body) == len(small) - 2
    assert all(torch.equal(small[key], large[key]) for key in body)
    assert small["fc.weight"].shape[0] == 2
    assert large["fc.weight"].shape[0] == 100


def test_zero_padded_shortcut_is_the_identity_on_the_kept_channels() -> None:
    block = models.build_model("resnet20", image_task()).get_submodule("layer2.0")
    assert isinstance(block.downsample, nn.Module)
    x = torch.randn(2, 16, 9, 9)
    out = block.downsample(x)
    assert out.shape == (2, 32, 5, 5)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not bool(out[:, :8].any() or out[:, 24:].any())
    assert list(block.downsample.parameters()) == []


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_conv_options(batch_norm: bool, activation: str, pool: str) -> None:
    torch.manual_seed(0)
    options = {"width": 4, "depth": 2, "batch_norm": batch_norm, "activation": activation, "pool": pool}
    module = models.build_model("conv", image_task(3, (1, 9, 9)), **options).double()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == (2 if batch_norm else 0)
    assert count(module) == (1 * 4 + 4 * 4) * 9 + (2 * 4 if not batch_norm else 2 * 8) + 4 * 3 + 3
    x = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    assert module(x).shape == (2, 3)
    # By hand: the same layers called one after another.
    out = x
    for block in module.get_submodule("blocks"):
        out = block.bn(block.conv(out))
        out = torch.relu(out) if activation == "relu" else torch.log1p(torch.exp(out))
        pooled = nn.MaxPool2d if pool == "max" else nn.AvgPool2d
        out = pooled(2, ceil_mode=True)(out)
    expected = module.get_submodule("fc")(out.mean((2, 3)))
    torch.testing.assert_close(module(x), expected)


def test_softplus_with_average_pooling_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    options = {"width": 2, "depth": 1, "batch_norm": False, "activation": "softplus", "pool": "avg"}
    module = models.build_model("conv", image_task(2, (1, 4, 4)), **options).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"blocks.0.conv.weight": weight}, (x,)).square().mean()

    weight = module.get_parameter("blocks.0.conv.weight").detach().requires_grad_()
    assert torch.autograd.gradgradcheck(loss, (weight,))


def test_width_scales_the_small_resnet() -> None:
    module = models.build_model("resnet20", image_task(4), width=4)
    assert module.get_parameter("conv1.weight").shape == (4, 3, 3, 3)
    assert module.get_parameter("fc.weight").shape == (4, 16)


def test_regression_head() -> None:
    module = models.build_model("conv", image_task(1, (1, 8, 8), kind="regression"))
    assert module(torch.randn(5, 1, 8, 8)).shape == (5, 1)


@pytest.mark.parametrize(
    ("name", "task", "options", "sentence"),
    [
        ("resnet21", image_task(), {}, "unknown model 'resnet21'; did you mean 'resnet"),
        ("transformer", image_task(), {}, "package.module:factory"),
        ("conv", image_task(), {"widht": 8}, "no option 'widht'; did you mean 'width'?"),
        ("resnet18", image_task(), {"width": 8}, "no option 'width'"),
        ("conv", image_task(), {"width": 0}, "width 0"),
        ("conv", image_task(), {"depth": "two"}, "depth 'two'"),
        ("resnet20", image_task(), {"width": 1.5}, "width 1.5"),
        ("conv", image_task(), {"activation": "sofplus"}, "did you mean 'softplus'?"),
        ("conv", image_task(), {"pool": "min"}, "pool 'min'"),
        ("conv", image_task(), {"batch_norm": "no"}, "batch_norm 'no'"),
        ("conv", image_task(outputs=None), {}, "outputs None"),
        ("resnet20", image_task(shape=None), {}, "does not say its input_shape"),
        ("resnet18", image_task(shape=(28, 28)), {}, "input_shape (28, 28)"),
        ("no_such_package:factory", image_task(), {}, "cannot import 'no_such_package'"),
        ("trajshift.models:no_such", image_task(), {}, "has no 'no_such'"),
        ("trajshift.models:", image_task(), {}, "is not an import path"),
        ("../mine.py:factory", image_task(), {}, "is not an import path"),
        ("math:pi", image_task(), {}, "is a float"),
    ],
)
def test_bad_input_is_refused(name: str, task: Task, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        models.build_model(name, task, **options)


def test_user_models_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "user_model_for_test.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, task, size=3):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(size, task.outputs)\n"
        "    @staticmethod\n"
        "    def make(task, **options):\n"
        "        return Net(task, **options)\n"
        "def needs(task, *, width):\n"
        "    return Net(task, width)\n"
        "def nothing(task):\n"
        "    return None\n"
    )
    task = image_task(6)
    assert models.build_model("user_model_for_test:Net", task, size=4).get_parameter("fc.weight").shape == (6, 4)
    assert models.build_model("user_model_for_test:Net.make", task, size=5).get_parameter("fc.weight").shape == (
        6,
        5,
    )
    with pytest.raises(UsageError, match=r"missing a required .*'width'"):
        models.build_model("user_model_for_test:needs", task)
    with pytest.raises(UsageError, match="returned a NoneType"):
        models.build_model("user_model_for_test:nothing", task)
    with pytest.raises(UsageError, match="no option 'sise'; did you mean 'size'"):
        models.build_model("user_model_for_test:Net", task, sise=4)


def test_import_paths_find_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "beside_me.py").write_text("answer = 42\n")
    code = "from trajshift.utils.imports import load_object; print(load_object('beside_me:answer', 'x'))"
    # -P (or an installed command) leaves the current directory off the path.
    script = f"import sys; sys.path = [p for p in sys.path if p]; {code}"
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "42", out.stderr


def test_names_and_checks_do_not_import_torch() -> None:
    code = (
        "import sys, trajshift.models as m; m.names(); m.check_model_name('resnet20'); m.check_model_name('a.b:c'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
