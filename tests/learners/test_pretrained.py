"""Published weights as the start of phi."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trajshift import MetaTrainer, models
from trajshift.cli.main import main
from trajshift.data.augmentation import image_task
from trajshift.errors import UsageError
from trajshift.evaluation.finetuning import finetune
from trajshift.learners.pretrained import load_start, locate
from trajshift.recipes.build_trainer import build_trainer, describe_start
from trajshift.recipes.recipe import validate
from trajshift.runs.resume import with_absolute_paths
from trajshift.task import Task


def task(outputs: int = 3, channels: int = 3) -> Task:
    x = torch.randint(0, 256, (12, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return image_task("a", (x, torch.arange(12) % outputs), (x, torch.arange(12) % outputs), outputs=outputs)


def model(task: Task) -> nn.Module:
    return models.build_model("conv", task, width=4, depth=2)


def weights() -> dict[str, Tensor]:
    """A trained network of 10 classes: no number in it is what a new one has."""
    generator = torch.Generator().manual_seed(9)
    state = model(task(10)).state_dict()
    drawn = {name: torch.rand(t.shape, generator=generator) for name, t in state.items() if t.is_floating_point()}
    return {name: drawn.get(name, tensor + 5) for name, tensor in state.items()}


def legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


Save = Callable[[dict[str, Tensor], Path], Any]
FORMS: dict[str, Save] = {
    "a.pth": torch.save,
    "old.pth": legacy,
    "wrapped.tar": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.pt": lambda state, path: torch.save({"model": state}, path),
    "parallel.bin": lambda state, path: torch.save({f"module.{n}": t for n, t in state.items()}, path),
    "a.safetensors": save_file,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    state = weights()
    FORMS[name](state, tmp_path / name)
    start = load_start(tmp_path / name)
    assert set(start) == set(state)
    assert all(torch.equal(start[key], state[key]) for key in state)


def test_phi_starts_from_all_but_head_and_statistics(tmp_path: Path) -> None:
    state = weights()
    torch.save(state, tmp_path / "a.pth")
    start = load_start(tmp_path / "a.pth")
    trainer = MetaTrainer(model, [task()], horizon=2, rounds=1, batch_size=4, initialization=start)
    phi = trainer.initialization
    assert len(phi) == 6
    assert all(torch.equal(phi[name], state[name]) for name in phi)


def test_fine_tuning_can_keep_the_published_statistics(tmp_path: Path) -> None:
    state = weights()
    torch.save(state, tmp_path / "a.pth")
    tuned = finetune(load_start(tmp_path / "a.pth"), task(), model=model, steps=0, running_stats="keep")
    found = tuned.module.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state if not name.startswith("fc"))
    assert tuned.fresh == ("fc.weight", "fc.bias")


def test_a_recipe_names_the_file_and_the_run_says_what_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    state = models.build_model("conv", task(10, channels=1), width=4, depth=1).state_dict()
    torch.save(state, "published.pth")
    Path("r.yaml").write_text(
        "{initialization: published.pth, horizon: 1, rounds: 1, batch_size: 4, threads: 1, meta_lr: 1e-30,"
        " output: {tensorboard: false}, model: {name: conv, options: {width: 4, depth: 1}},"
        " tasks: {a: {source: 'digits:few-classes'}}, targets: {six: {source: 'digits:six-to-nine'}},"
        " finetune: {steps: 1, batch_size: 4, running_stats: keep}}"
    )
    said = [command(words, monkeypatch, capsys) for words in (["train", "r.yaml", "--name", "one"], FINETUNE)]
    assert "published.pth: 3 parameters; not used: fc.weight, fc.bias; 3 BatchNorm statistics" in said[0]
    phi = load_start("runs/one/initialization.safetensors")
    assert all(torch.allclose(phi[name], state[name], rtol=0, atol=1e-20) for name in phi)
    assert "published.pth" in said[1]


FINETUNE = ["finetune", "published.pth", "--recipe", "r.yaml"]


def command(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line prints."""
    monkeypatch.setattr(sys, "argv", ["trajshift", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_start_of_ones_own_is_described_too(tmp_path: Path) -> None:
    recipe = {
        "horizon": 1, "rounds": 1, "initialization": str(tmp_path / "phi.safetensors"),
        "tasks": {"a": {"source": "digits:few-classes"}},
    }  # fmt: skip
    drawn = validate({**recipe, "initialization": None})
    trainer = build_trainer(drawn)
    assert describe_start(drawn, trainer) is None
    trainer.initialization.save(tmp_path / "phi.safetensors")
    given = validate(recipe)
    assert describe_start(given, build_trainer(given)) == (
        f"phi starts from {tmp_path / 'phi.safetensors'}: {len(trainer.initialization)} parameters"
    )


def test_all_mismatches_are_listed(tmp_path: Path) -> None:
    state = weights()
    state["stem.weight"] = state.pop("blocks.0.bn.weight")
    state["blocks.1.conv.weight"] = torch.zeros(4, 7, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UsageError) as caught:
        MetaTrainer(model, [task()], horizon=1, rounds=1, batch_size=4, initialization=load_start(tmp_path / "a.pth"))
    assert str(caught.value) == (
        "the initialization does not fit the model (missing: blocks.0.bn.weight; wrong shape: blocks.1.conv.weight"
        " (4, 7, 3, 3), not (4, 4, 3, 3); unexpected: stem.weight); use the model it was learned with"
    )


def test_tensors_that_the_model_has_no_place_for_are_refused_before_training() -> None:
    start = {**weights(), "projector.weight": torch.zeros(2)}
    with pytest.raises(UsageError, match=r"does not fit the model \(unexpected: projector.weight\)"):
        MetaTrainer(model, [task()], horizon=1, rounds=1, batch_size=4, initialization=start)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("sprung").touch, ()


def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights(), "trap": Trap()}, "trap.pth")
    with pytest.raises(
        UsageError, match=r"trap.pth is not a readable state dict \(it contains more than tensors\); save"
    ):
        load_start("trap.pth")
    assert not Path("sprung").exists()
    Path("text.pth").write_text("hello")
    with pytest.raises(UsageError, match=r"text.pth is not a readable state dict"):
        load_start("text.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(UsageError, match=r"list.pth contains no named tensors; save the module's state_dict"):
        load_start("list.pth")
    with pytest.raises(UsageError, match=r"no weights at gone.pth; give the path"):
        load_start("gone.pth")
    with pytest.raises(UsageError, match=r"no initialization at gone.safetensors"):
        load_start("gone.safetensors")


def test_weights_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save_file(weights(), tmp_path / "model.safetensors")
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert set(load_start("hub:timm/resnet18.tv_in1k")) == set(weights())
    assert locate("hub:timm/resnet18.tv_in1k@bbd144b") == tmp_path / "model.safetensors"
    assert asked == [
        ("timm/resnet18.tv_in1k", "model.safetensors", None),
        ("timm/resnet18.tv_in1k", "model.safetensors", "bbd144b"),
    ]
    recipe = validate({"initialization": "hub:a/b", "tasks": {"a": {"source": "digits:few-classes"}}})
    assert with_absolute_paths(recipe).initialization == "hub:a/b"
    with pytest.raises(UsageError, match="'hub:resnet18' names no weights; write hub:OWNER/NAME"):
        locate("hub:resnet18")

    def offline(repository: str, file: str, revision: str | None) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(UsageError, match=r"hub:a/b is not available from the hub \(no route to host\); give a"):
        load_start("hub:a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"weights from the hub need huggingface_hub: pip install 'trajshift\[data\]'"):
        load_start("hub:a/b")


def test_an_imagenet_network_starts_a_resnet18(tmp_path: Path) -> None:
    state = models.build_model("resnet18", task(1000)).state_dict()  # torchvision's names: see test_models.py
    torch.save(state, tmp_path / "resnet18.pth")
    recipe = validate({
        "horizon": 1, "rounds": 1, "batch_size": 2, "seed": 5, "initialization": str(tmp_path / "resnet18.pth"),
        "model": {"name": "resnet18"}, "data": {"channels": 3}, "tasks": {"a": {"source": "digits:few-classes"}},
    })  # fmt: skip
    phi = build_trainer(recipe).initialization
    assert len(phi) == 60
    assert all(torch.equal(phi[name], state[name]) for name in phi)
