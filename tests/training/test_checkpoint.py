"""Checkpoints: nothing half, nothing damaged goes unnoticed, and what comes back is what was saved, bit for bit."""

from __future__ import annotations

import ast
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trajshift
from tests.helpers import toys
from trajshift import Inner, MetaTrainer
from trajshift.errors import UsageError
from trajshift.training import checkpoint

FILES = 5  # shared, three tasks, manifest


class Died(BaseException):
    """Stands for a kill: no handler runs but `finally`."""


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def two_checkpoints(directory: Path) -> MetaTrainer:
    """Checkpoints of steps 2 and 5 of three tasks."""
    made = toys.trainer(toys.tasks(3))
    for step in (2, 5):
        toys.run(made, step)
        checkpoint.save(directory, made.meta_step, {"step": step})
    return made


# -- round trip ----------------------------------------------------------------------------------------------

SGD = {"momentum": 0.9, "weight_decay": 5e-4}
OPTIMIZERS: dict[str, Inner] = {
    "sgd": Inner(lr=0.05, options={}),
    "momentum": Inner(lr=0.05, options=SGD),
    "nesterov-cosine": Inner(lr=0.05, options=SGD | {"nesterov": True}, schedule="cosine"),
    "flat-sgd": Inner(lr=0.05, options=SGD, flat=True),
    "flat-adam": Inner(optimizer="adam", flat=True),
    "adam": Inner(optimizer="adam", options={"amsgrad": True}),
    "adamw-step": Inner(optimizer="adamw", schedule="step", milestones=(0.5,)),
    "asgd": Inner(optimizer="asgd", options={"t0": 1}),
    "rmsprop": Inner(optimizer="rmsprop", options={"momentum": 0.9, "centered": True}),
    "adagrad": Inner(optimizer="adagrad"),
    "nadam": Inner(optimizer="nadam"),
}
CHOICES: dict[str, dict[str, Any]] = {
    "accurate": {"method": "accurate"},
    "accurate-adam": {"method": "accurate", "inner": Inner(optimizer="adam"), "meta_every": 2},
    "accurate-sampled": {"method": "accurate", "tasks_per_round": 2, "rounds": 6},
    "random-shifting": {"method": "random-shifting"},
    "reptile": {"method": "reptile"},
    "reptile-adam-outside": {"method": "reptile", "meta_optimizer": "adam", "meta_lr": 0.01},
    "fomaml-heldout": {"method": "fomaml", "batch": "heldout", "meta_every": 2, "carry": "shift"},
    "imaml": {"method": "imaml"},
    "leap": {"method": "leap"},
    "leap-energy": {"method": "leap", "metagrad_options": {"norm": False, "stabilizer": False}},
    "leap-without-loss": {"method": "leap", "metagrad_options": {"loss": False}},
    "leap-shifting": {"method": "leap", "meta_every": 1, "carry": "shift"},
    "anil": {"method": "anil"},
    "mtl": {"method": "mtl"},
    "mtl-adam": {"method": "mtl", "inner": Inner(optimizer="adam")},
    "sampled": {"tasks_per_round": 2, "rounds": 6},
    "sampled-reptile": {"method": "reptile", "tasks_per_round": 1, "rounds": 6},
    "renewed": {"renew": ("heads", "statistics"), "grad_clip": 0.5},
    "renewed-optimizer": {"renew": ("optimizer",)},
}
CASES = {**{name: {"inner": inner} for name, inner in OPTIMIZERS.items()}, **CHOICES}


@pytest.mark.parametrize("name", CASES)
def test_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = toys.trainer(toys.tasks(3), **CASES[name])
    saved, losses = {}, []
    for step in range(1, whole.total_steps + 1):
        losses += toys.run(whole, step)
        if step % 3 == 0:
            whole.metrics()
        if step in (toys.HORIZON, 6):  # at a boundary and inside a round
            saved[step] = checkpoint.save(tmp_path / "whole", whole.meta_step)
    end = content(checkpoint.save(tmp_path / "whole", whole.meta_step))
    for step, path in saved.items():
        resumed = toys.trainer(toys.tasks(3), **CASES[name])
        checkpoint.load(path, resumed.meta_step)
        assert content(checkpoint.save(tmp_path / "again", resumed.meta_step)) == content(path)
        again = []
        for later in range(step + 1, resumed.total_steps + 1):
            again += toys.run(resumed, later)
            if later % 3 == 0:
                resumed.metrics()
        assert all(torch.equal(a, b) for a, b in zip(losses[step:], again, strict=True))
        assert torch.equal(resumed.phi, whole.phi)
        assert content(checkpoint.save(tmp_path / "resumed", resumed.meta_step)) == end


def test_metrics_and_extra_survive(tmp_path: Path) -> None:
    whole = toys.trainer(toys.tasks(3), method="leap")
    toys.run(whole, 3)
    path = checkpoint.save(tmp_path, whole.meta_step, {"recipe": "abc", "bytes": 17})
    resumed = toys.trainer(toys.tasks(3), method="leap")
    assert checkpoint.load(path, resumed.meta_step) == {"recipe": "abc", "bytes": 17}
    assert resumed.metrics() == whole.metrics()


# -- atomic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("place", range(FILES))
@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_death_inside_a_write_leaves_no_checkpoint(
    place: int, half: bool, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toys.trainer(toys.tasks(3))
    toys.run(made, 2)
    before = content(checkpoint.save(tmp_path, made.meta_step))
    toys.run(made, 5)
    written = []
    original = checkpoint._write

    def dying(path: Path, body: bytes) -> str:
        written.append(path)
        if len(written) <= place:
            return original(path, body)
        if half:
            path.write_bytes(body[: len(body) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path)) if full else Died

    monkeypatch.setattr(checkpoint, "_write", dying)
    with pytest.raises(UsageError if full else Died) as caught:
        checkpoint.save(tmp_path, made.meta_step)
    monkeypatch.undo()
    if full:
        assert "step 5 could not be written" in str(caught.value)
        assert "No space left" in str(caught.value)
        assert not list(tmp_path.glob("*.tmp"))
    assert checkpoint.steps(tmp_path) == [2]
    newest, notes = checkpoint.latest_valid(tmp_path)
    assert newest is not None
    assert (newest.name, notes) == ("000000002", [])
    assert content(newest) == before
    again = checkpoint.save(tmp_path, made.meta_step)  # over what was left half-written
    assert checkpoint.verify(again)["numbers"]["step"] == 5
    assert not list(tmp_path.glob("*.tmp"))


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    original = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda path, body: names.append(path.name) or original(path, body))
    two_checkpoints(tmp_path)
    assert len(names) == 2 * FILES
    assert names[FILES - 1] == names[-1] == "manifest.json"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UsageError, match="step 0 could not be written"):
        checkpoint.save(tmp_path / "checkpoints", toys.trainer(toys.tasks(1)).meta_step)


# -- damage --------------------------------------------------------------------------------------------------


def damage(file: Path, how: str) -> None:
    body = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "flipped":
        body[len(body) // 2] ^= 1
    file.write_bytes(body[:-3] if how == "short" else b"" if how == "empty" else body)


@pytest.mark.parametrize("how", ["missing", "flipped", "short", "empty"])
@pytest.mark.parametrize("place", range(FILES))
def test_damage_is_named_and_the_previous_one_used(place: int, how: str, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    file = sorted((tmp_path / "000000005").iterdir())[place]
    damage(file, how)
    newest, notes = checkpoint.latest_valid(tmp_path)
    assert newest == tmp_path / "000000002"
    assert len(notes) == 1
    assert file.name in notes[0]
    assert str(file.parent) in notes[0]
    with pytest.raises(UsageError, match=file.name):
        checkpoint.load(file.parent, toys.trainer(toys.tasks(3)).meta_step)


def test_every_changed_number_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    file = tmp_path / "000000005" / "manifest.json"
    body = file.read_bytes()
    checkpoint.verify(file.parent)
    for place in (index for index, letter in enumerate(body) if chr(letter).isdigit()):
        changed = bytearray(body)
        changed[place] = ord("1") if body[place] != ord("1") else ord("2")
        file.write_bytes(changed)
        with pytest.raises(UsageError, match=r"manifest\.json"):
            checkpoint.verify(file.parent)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"files": {}}', '{"files": []}', "not json"])
def test_a_manifest_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "000000005" / "manifest.json").write_text(text)
    newest, notes = checkpoint.latest_valid(tmp_path)
    assert newest == tmp_path / "000000002"
    assert "manifest.json" in notes[0]


def test_nothing_good_left(tmp_path: Path) -> None:
    assert checkpoint.latest_valid(tmp_path / "none") == (None, [])
    two_checkpoints(tmp_path)
    for path in tmp_path.iterdir():
        damage(path / "shared.safetensors", "missing")
    newest, notes = checkpoint.latest_valid(tmp_path)
    assert newest is None
    assert ["000000005" in notes[0], "000000002" in notes[1]] == [True, True]


# -- pruning -------------------------------------------------------------------------------------------------


def folders(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).mkdir()
        (directory / name / "file").write_text("x")


def test_prune_keeps_the_newest_and_clears_what_is_half_written(tmp_path: Path) -> None:
    folders(tmp_path, "000000001", "000000002", "000000010", "000000009.tmp", "notes")
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000002", "000000010", "notes"]
    folders(tmp_path, "000000011.tmp")
    checkpoint.prune(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000002", "000000010", "notes"]
    checkpoint.prune(tmp_path / "none", 2)


def test_prune_keeps_what_the_run_stands_on_not_what_it_passed_over(tmp_path: Path) -> None:
    folders(tmp_path, "000000010", "000000015", "000000020")  # 20 is damaged, the run went on from 10
    checkpoint.prune(tmp_path, 1, step=15)
    assert [path.name for path in tmp_path.iterdir()] == ["000000015"]


def test_no_pickle_is_ever_read() -> None:
    for file in Path(trajshift.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names), file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = ast.unparse(node.func.value)
                arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if owner == "torch" and file.name == "pretrained.py":  # tensors alone: nothing in the file is run
                    assert arguments.get("weights_only") == "True", f"{file}:{node.lineno}"
                    continue
                assert owner not in ("torch", "torch.jit", "pickle"), f"{file}:{node.lineno}"
                if owner in ("np", "numpy"):
                    assert arguments.get("allow_pickle") == "False", f"{file}:{node.lineno}"


# -- other tasks, other models -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["trajectory-shifting", "accurate", "leap"])
def test_tasks_change_at_a_round_boundary(method: str, tmp_path: Path) -> None:
    listed = toys.tasks(5)
    made = toys.trainer(listed[:3], method=method)
    toys.run(made, toys.HORIZON)
    path = checkpoint.save(tmp_path, made.meta_step)
    others = [listed[4], listed[2], listed[0]]  # t1 left, t4 joined, in another order
    resumed = toys.trainer(others, method=method)
    checkpoint.load(path, resumed.meta_step)
    made.set_tasks(others)
    for trainer in (made, resumed):
        toys.run(trainer, trainer.total_steps)
    assert torch.equal(made.phi, resumed.phi)
    for a, b in zip(made.learners, resumed.learners, strict=True):
        assert a.task.name == b.task.name
        assert all(torch.equal(x, b.own_tensors()[name]) for name, x in a.own_tensors().items())


@pytest.mark.parametrize("chosen", [(0, 1), (0, 1, 2, 3), (2, 1, 0), (0, 1, 3)])
def test_tasks_do_not_change_inside_a_round(chosen: tuple[int, ...], tmp_path: Path) -> None:
    listed = toys.tasks(5)
    path = tmp_path / "000000005"
    two_checkpoints(tmp_path)
    with pytest.raises(UsageError, match="in the middle of a round"):
        checkpoint.load(path, toys.trainer([listed[index] for index in chosen]).meta_step)


def own_head(task: trajshift.Task) -> nn.Module:
    module = toys.model(task)
    module.fc = nn.Linear(module.fc.in_features, 7).double()
    return module


OTHERS: dict[str, Any] = {
    "wider": lambda task: toys.model(task, width=6),
    "deeper": lambda task: toys.model(task, depth=3),
    "shallower": lambda task: toys.model(task, depth=1),
    "no batch norm": lambda task: toys.model(task, batch_norm=False),
    "another head": own_head,
    "float32": lambda task: toys.model(task).float(),
}


@pytest.mark.parametrize("step", [2, toys.HORIZON])
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_one_sentence(other: str, step: int, tmp_path: Path) -> None:
    made = toys.trainer(toys.tasks(3))
    toys.run(made, step)
    path = checkpoint.save(tmp_path, made.meta_step)
    with pytest.raises(UsageError, match="another model") as caught:
        checkpoint.load(path, toys.trainer(toys.tasks(3), model=OTHERS[other]).meta_step)
    assert "\n" not in str(caught.value)


def test_manifest_is_plain_json_without_clock_or_place(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    text = (tmp_path / "000000005" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert set(json.loads(text)["tasks"]) == {"t0", "t1", "t2"}
