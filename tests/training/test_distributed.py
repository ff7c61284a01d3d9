"""Many ranks do what one does: real processes over gloo, compared in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers import toys
from tests.helpers.processes import start_ranks, wait
from trajshift import MetaTrainer, Task
from trajshift.distributed import World, balance, set_threads
from trajshift.errors import UsageError
from trajshift.training import checkpoint
from trajshift.training.approximation_error import ApproximationErrorMeter

SAVED = 6
"""Step of the checkpoint, in the middle of the second round."""

CASES: dict[str, dict[str, Any]] = {
    "shifting": {"count": 5},
    "shifting-one-task": {"count": 1},
    "overlapped": {"count": 5, "overlap": True},
    "reptile": {"count": 5, "method": "reptile"},
    "accurate": {"count": 5, "method": "accurate"},
    "leap": {"count": 5, "method": "leap"},
    "gauged": {"count": 5, "error_every": 2},
    "imaml": {"count": 3, "method": "imaml"},
    "mtl": {"count": 5, "method": "mtl"},
    "sampled": {"count": 5, "tasks_per_round": 2, "rounds": 4},
    "sampled-accurate": {"count": 5, "tasks_per_round": 3, "method": "accurate", "renew": ("statistics",)},
}


def make(name: str) -> MetaTrainer:
    options = dict(CASES[name])
    if every := options.pop("error_every", None):
        options["error_meter"] = ApproximationErrorMeter.every(every, toys.HORIZON)
    return toys.trainer(toys.tasks(options.pop("count")), **options)


def go_on(made: MetaTrainer, until: int) -> list[dict[str, Any]]:
    """Runs to a step; the metrics of every third, so that they span a round's end."""
    rows = []
    for step in range(made.step + 1, until + 1):
        toys.run(made, step)
        if step % 3 == 0:
            rows.append(made.metrics())
    return rows


def train_all(folder: Path, other: Path | None) -> None:
    """Every case to its end, again from its own checkpoint, and from the checkpoint of another world size."""
    for name in CASES:
        whole = make(name)
        rows = go_on(whole, SAVED)
        path = checkpoint.save(folder / name / "saved", whole.meta_step)
        rows += go_on(whole, whole.total_steps)
        checkpoint.save(folder / name / "end", whole.meta_step)
        resumed = make(name)
        checkpoint.load(path, resumed.meta_step)
        again = go_on(resumed, resumed.total_steps)
        checkpoint.save(folder / name / "resumed", resumed.meta_step)
        if other is not None:
            moved = make(name)
            checkpoint.load(other / name / "saved" / path.name, moved.meta_step)
            go_on(moved, moved.total_steps)
            checkpoint.save(folder / name / "moved", moved.meta_step)
        homes = whole.meta_step.world.gather(whole.meta_step.active.local)
        if whole.meta_step.world.rank == 0:
            (folder / name / "said.json").write_text(json.dumps({"rows": rows, "again": again, "homes": homes}))


def state_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and all numbers of the only checkpoint in a folder."""
    path, notes = checkpoint.latest_valid(folder)
    assert path is not None, notes
    files = sorted(path.glob("*.safetensors"))
    tensors = {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return tensors, checkpoint.verify(path)


def assert_agree(a: Path, b: Path) -> None:
    """Tensors to 1e-10, numbers exactly."""
    (one, one_manifest), (other, other_manifest) = state_of(a), state_of(b)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert one_manifest["numbers"] == other_manifest["numbers"]
    assert one_manifest["tasks"] == other_manifest["tasks"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process makes of every case."""
    folder = tmp_path_factory.mktemp("one")
    train_all(folder, None)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def many(request: pytest.FixtureRequest, one: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """What 2 and 3 ranks make of every case."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    exits = wait(*start_ranks(train_all, request.param, folder, one, logs=folder))
    assert exits == [0] * request.param, "\n".join(file.read_text() for file in folder.glob("rank-*.txt"))
    return request.param, folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name: str, many: tuple[int, Path], one: Path) -> None:
    assert_agree(many[1] / name / "end", one / name / "end")


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_gathered_from_all_ranks(name: str, many: tuple[int, Path], one: Path) -> None:
    said, alone = (json.loads((folder / name / "said.json").read_text()) for folder in (many[1], one))
    assert len(said["rows"]) >= 4
    for a, b in zip(said["rows"], alone["rows"], strict=True):
        assert a.keys() == b.keys()
        assert list(a["tasks"]) == list(b["tasks"])
        for key in a.keys() - {"tasks", "meta_update_norm", "approximation_errors"}:
            assert a[key] == b[key], key
        for mine, expected in zip(*(row.get("approximation_errors", []) for row in (a, b)), strict=True):
            assert mine.pop("task") == expected.pop("task")
            assert mine == pytest.approx(expected, rel=1e-9)
        assert a["meta_update_norm"] == pytest.approx(b["meta_update_norm"], rel=1e-9, abs=1e-10)
        for task, values in a["tasks"].items():
            assert values == pytest.approx(b["tasks"][task], rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_resume_at_the_same_size_is_bit_for_bit(name: str, many: tuple[int, Path], one: Path) -> None:
    for folder in (many[1], one):
        assert bytes_of(folder / name / "resumed") == bytes_of(folder / name / "end")
        said = json.loads((folder / name / "said.json").read_text())
        assert said["again"] == said["rows"][SAVED // 3 :]


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_to_another_size_and_back(name: str, many: tuple[int, Path], one: Path, tmp_path: Path) -> None:
    assert_agree(many[1] / name / "moved", one / name / "end")  # from one process to many
    back = make(name)
    checkpoint.load(many[1] / name / "saved" / f"{SAVED:09d}", back.meta_step)
    go_on(back, back.total_steps)
    checkpoint.save(tmp_path, back.meta_step)
    assert_agree(tmp_path, one / name / "end")


@pytest.mark.parametrize("name", CASES)
def test_every_task_has_one_home(name: str, many: tuple[int, Path]) -> None:
    homes = json.loads((many[1] / name / "said.json").read_text())["homes"]
    count = CASES[name]["count"]
    assert sorted(task for home in homes for task in home) == [f"t{index}" for index in range(count)]
    assert sum(bool(home) for home in homes) == min(count, many[0])


# -- what goes wrong -----------------------------------------------------------------------------------------


class Square(nn.Module):
    """One shared number; its loss is no matrix product, so that a traced forward pass counts no operations."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=torch.float64))


def squares(count: int, poisoned: str = "") -> list[Task]:
    def loss_of(name: str) -> Any:
        def loss(module: Square, batch: Any) -> Tensor:
            value = (module.theta - 2.0).square().sum()
            return value / 0.0 if name == poisoned else value

        return loss

    data = (torch.zeros(4, 1), torch.zeros(4))
    return [Task(name=f"s{index}", train=data, loss=loss_of(f"s{index}")) for index in range(count)]


def square_trainer(listed: list[Task], **options: Any) -> MetaTrainer:
    return toys.trainer(listed, model=lambda task: Square(), shared=("theta",), **options)


def sentence(attempt: Any) -> str:
    try:
        attempt()
    except UsageError as error:
        return str(error)
    return ""


def go_wrong(folder: Path) -> None:
    """Collects what each rank says."""
    rank = int(os.environ["RANK"])
    said: dict[str, Any] = {}
    said["start"] = sentence(lambda: square_trainer(squares(4), initialization={"theta": torch.tensor([1.0 + rank])}))
    drifted = square_trainer(squares(4))
    toys.run(drifted, 3)
    if rank == 1:
        drifted.phi[0] += 1e-15
    said["checkpoint"] = sentence(lambda: checkpoint.save(folder / "drifted", drifted.meta_step))
    said["home"] = drifted.meta_step.active.home
    apart = toys.trainer(toys.tasks(4))
    paths = []
    for step in (2, 3):
        toys.run(apart, step)
        paths.append(checkpoint.save(folder / "apart", apart.meta_step))
    said["loaded"] = sentence(lambda: checkpoint.load(paths[rank], toys.trainer(toys.tasks(4)).meta_step))
    poisoned = square_trainer(squares(4, poisoned="s3"), grad_clip=None)
    toys.run(poisoned, 2)
    said["poisoned"] = sentence(poisoned.check_finite)
    moved = toys.trainer(toys.tasks(4))
    toys.run(moved, toys.HORIZON)
    moved.set_tasks([toys.tasks(6)[index] for index in (5, 4, 1, 0)])
    toys.run(moved, moved.total_steps)
    checkpoint.save(folder / "changed-tasks", moved.meta_step)
    if rank == 1:
        (folder / "full").write_text("a file is in the way of the folder")
    moved.meta_step.world.barrier()
    said["full"] = sentence(lambda: checkpoint.save(folder / "full", moved.meta_step))
    said["any"] = [moved.meta_step.world.any(rank == 1), moved.world.any(False)]
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    exits = wait(*start_ranks(go_wrong, 2, folder, logs=folder))
    assert exits == [0, 0], "\n".join(file.read_text() for file in folder.glob("rank-*.txt"))
    return folder


def said(folder: Path, what: str) -> list[Any]:
    return [json.loads((folder / f"said-{rank}.json").read_text())[what] for rank in (0, 1)]


def test_unequal_phi_stops_every_rank(wrong: Path) -> None:
    names = {"start": "the first phi", "checkpoint": "phi at step 3", "loaded": "phi of the checkpoint of step "}
    for what, name in names.items():
        for one in said(wrong, what):
            assert one.startswith(name)
            assert "on rank(s) 1 differs from rank 0; the run is stopped" in one
    assert checkpoint.latest_valid(wrong / "drifted") == (None, [])


def test_the_culprit_on_another_rank_is_named_everywhere(wrong: Path) -> None:
    sentences = said(wrong, "poisoned")
    assert sentences[0] == sentences[1]
    assert "task 's3'" in sentences[0]
    assert "inner step 1 " in sentences[0]
    assert "'s0'" not in sentences[0]


def test_a_full_disk_is_told_by_every_rank(wrong: Path) -> None:
    sentences = said(wrong, "full")
    assert sentences[0] == sentences[1]
    assert "could not be written" in sentences[0]


def test_a_flag_on_one_rank_is_seen_by_all(wrong: Path) -> None:
    assert said(wrong, "any") == [[True, False]] * 2


def test_tasks_without_counted_operations_are_spread_too(wrong: Path) -> None:
    homes = said(wrong, "home")
    assert homes[0] == homes[1]
    assert sorted(homes[0].values()) == [0, 0, 1, 1]


def test_tasks_that_stay_keep_head_and_statistics_on_many_ranks(wrong: Path, tmp_path: Path) -> None:
    alone = toys.trainer(toys.tasks(4))
    toys.run(alone, toys.HORIZON)
    alone.set_tasks([toys.tasks(6)[index] for index in (5, 4, 1, 0)])
    toys.run(alone, alone.total_steps)
    checkpoint.save(tmp_path, alone.meta_step)
    assert_agree(wrong / "changed-tasks", tmp_path)


# -- the parts -----------------------------------------------------------------------------------------------


def test_balance_puts_the_heaviest_first() -> None:
    costs = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 3.0, "e": 2.0}
    assert balance(costs, 2) == {"b": 0, "c": 1, "d": 1, "e": 0, "a": 1}
    assert balance(costs, 1) == dict.fromkeys(costs, 0)
    assert len(set(balance(costs, 7).values())) == 5
    assert balance(dict(reversed(costs.items())), 3) == balance(costs, 3)
    assert sorted(balance(dict.fromkeys("abcde", 0.0), 2).values()) == [0, 0, 0, 1, 1]
    assert balance(costs, 2, {"b": 1, "e": 1}) == {"b": 1, "e": 1, "c": 0, "d": 0, "a": 0}


@pytest.mark.parametrize(
    ("cores", "processes", "asked", "share"),
    [(8, 1, None, 8), (8, 2, None, 4), (8, 3, None, 2), (2, 4, None, 1), (8, 2, 1, 1), (8, 2, 16, 4), (8, 2, 0, 1)],
)
def test_threads_are_shared_among_processes(
    cores: int, processes: int, asked: int | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert set_threads(World(0, processes, processes), asked) == share
    assert chosen == [share]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.current()
    assert (world.rank, world.size, world.gather({"a": 1}), world.any(True)) == (0, 1, [{"a": 1}], True)
    assert torch.equal(world.sum_(torch.ones(2)), torch.ones(2))
    world.same("digest", "phi")
    world.barrier()
    world.close()
