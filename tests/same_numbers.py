"""Digests of what training, resuming, fine-tuning and the command line compute, to compare two versions on one machine.

`python tests/same_numbers.py > FILE` records them as JSON {name: SHA-256}; `--compare FILE` prints each difference from
such a record and exits with status 1 if there is one. The bits depend on the CPU and on the version of torch, so no
record is kept here. Every option is passed explicitly: a changed default changes nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

# -- the adapter: all that depends on where things are in the package and what its arguments are called ------
from trajshift import METHODS, Inner, MetaTrainer, Task, finetune, models
from trajshift.cli.main import app
from trajshift.data.digits import digits_targets, digits_tasks
from trajshift.learners.initialization import METADATA_KEY, load_initialization
from trajshift.training.approximation_error import ApproximationErrorMeter
from trajshift.training.checkpoint import load, save
from trajshift.training.engines.cuda_graph import Graph
from trajshift.training.engines.parallel import Parallel

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.options import in_sections
from tests.helpers.recording import Recorder


def build(model: Any, tasks: list[Task], method: str, options: dict[str, Any], engine: Any = "loop") -> MetaTrainer:
    """A trainer from `OPTIONS`, some of them replaced."""
    inner = {name.removeprefix("inner_"): value for name, value in options.items() if name.startswith("inner_")}
    others = {name: value for name, value in options.items() if not name.startswith("inner_")}
    meter = ApproximationErrorMeter.every(every, options["horizon"]) if (every := others.pop("error_every")) else None
    arguments = in_sections({"inner": Inner(**inner), "engine": engine, **others})
    return MetaTrainer(model, tasks, method, error_meter=meter, **arguments)


def engines(trainer: MetaTrainer) -> dict[str, Any]:
    """Those beside the loop: always side by side, and recorded on the stand-in for CUDA graphs, where that can be."""
    parallel = Parallel(2)
    parallel.side_by_side = True
    return {"parallel": parallel} | ({} if Graph.obstacle(trainer.meta_step) else {"graph": Graph(Recorder())})


def unsealed(name: str, content: bytes, folder: Path) -> bytes:
    """A run's file without the digests in it, which came after the first records were made."""
    old = partial(serialize_without_digest, folder / "initialization.safetensors")
    if name == "initialization.safetensors":
        return old()
    if name == "evaluation.jsonl":
        new = sha256((folder / "initialization.safetensors").read_bytes()).hexdigest()[:12]
        return content.replace(new.encode(), sha256(old()).hexdigest()[:12].encode())
    return content


def serialize_without_digest(file: Path) -> bytes:
    """An initialization as version 0.1 wrote it."""
    found = load_initialization(file)
    return serialize(dict(found), {METADATA_KEY: json.dumps(found.about, sort_keys=True)})


# -- what is run ---------------------------------------------------------------------------------------------
SGD, NESTEROV = {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
CONV = {"width": 4, "depth": 2, "batch_norm": True, "activation": "relu", "pool": "max"}
OPTIONS: dict[str, Any] = {
    "horizon": 6, "rounds": 2, "meta_lr": None, "meta_every": None, "carry": None, "adapt": None, "metagrad": None,
    "batch": None, "metagrad_options": {}, "inner_optimizer": "sgd", "inner_lr": 0.02, "inner_options": SGD,
    "inner_schedule": "constant", "inner_milestones": (0.4, 0.7, 0.9), "inner_factor": 0.3,
    "inner_flat": False, "meta_optimizer": None, "meta_options": {}, "batch_size": 8, "seed": 3, "head": "fc",
    "shared": None, "renew": (), "tasks_per_round": None, "initialization": None, "heldout": 0.2, "workers": 0,
    "device": "cpu", "grad_clip": None, "autocast": None, "error_every": None, "channels_last": False, "overlap": False,
}  # fmt: skip
MIXES: dict[str, dict[str, Any]] = {
    "adam inside": {"inner_optimizer": "adam", "inner_lr": 0.002, "inner_options": {}},
    "adam outside": {"method": "reptile", "meta_optimizer": "adam", "meta_lr": 0.01, "meta_options": {"eps": 1e-6}},
    "flat cosine": {"inner_flat": True, "inner_schedule": "cosine"},
    "nesterov step": {"inner_options": NESTEROV, "inner_schedule": "step", "seed": 4},
    "clipped and renewed": {"grad_clip": 0.5, "renew": ("heads", "optimizer", "statistics"), "meta_lr": 0.3},
    "accurate sampled": {"method": "accurate", "tasks_per_round": 1, "rounds": 3, "meta_every": 2},
    "error measured": {"error_every": 2}, "overlap": {"overlap": True},
    "bfloat16": {"autocast": torch.bfloat16}, "channels last": {"channels_last": True},
    "held-out fomaml": {"method": "fomaml", "batch": "heldout", "meta_every": 2, "carry": "shift"},
    "leap, own sharing": {"method": "leap", "shared": ("[!f]*weight",), "metagrad_options": {"norm": False}},
}  # fmt: skip
FINETUNE: dict[str, Any] = {
    "head": "fc", "steps": 5, "batch_size": 8, "optimizer": "sgd", "lr": 0.05, "options": NESTEROV, "schedule": "step",
    "milestones": (0.4, 0.7, 0.9), "factor": 0.3, "seed": 3, "train_images": 30, "device": "cpu", "dtype": None,
    "workers": 0, "evaluate_every": 2,
}  # fmt: skip
COMMAND = [
    "batch_size=4", "threads=1", "horizon=6", "seed=3", "model.name=conv", "model.options={width: 4, depth: 2}",
    "inner.options={momentum: 0.9, weight_decay: 0.0005}", "train_on=[upright,turned,few-classes]",
    "finetune.options={momentum: 0.9, nesterov: true, weight_decay: 0.0005}", "finetune.steps=4",
    "output.log_every=2", "output.checkpoint_every=4", "output.keep=null", "output.tensorboard=false",
]  # fmt: skip
FILES = ("initialization.safetensors", "metrics.jsonl", "evaluation.jsonl")
RUNS = {
    "shifting": ["method=trajectory-shifting", "inner.lr=0.02", "inner.schedule=cosine", "output.error_every=2"],
    "leap": ["method=leap", "inner.optimizer=adam", "inner.lr=0.002", "inner.options={}", "tasks_per_round=2"],
}


def perceptron(task: Task, dropout: float) -> nn.Module:
    """Three layers for vectors `[5]`; with dropout, which the loop alone can repeat, or without."""
    drop = [nn.Dropout(dropout)] if dropout else []
    made = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), *drop)
    made.add_module("fc", nn.Linear(16, task.outputs or 1))
    return made


def kinds(dropout: float) -> dict[str, tuple[Any, list[Task], Task]]:
    """Kind of data -> model, source tasks (vectors: of unequal kinds, sizes and weights), and a target."""
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1]], dim=1)
    vectors = [
        Task(name="sum", train=(x[:30], y[:30, :1]), test=(x[30:], y[30:, :1]), outputs=1, kind="regression"),
        Task(name="both", train=(x[:20], y[:20]), outputs=2, kind="regression", weight=2.0),
        Task(name="sign", train=(x, (y[:, 1] > 0).long()), outputs=2, batch_size=5),
    ]
    images, target = list(digits_tasks("upright", "few-classes").values()), digits_targets("six-to-nine")["six-to-nine"]
    conv, mlp = partial(models.build_model, "conv", **CONV), partial(perceptron, dropout=dropout)
    return {"digits": (conv, images, target), "vectors": (mlp, vectors, vectors[0])}


def training(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Presets by every engine and mixes by the loop, on each kind of data; all of them also stopped and resumed."""
    for case, changes in ({method: {"method": method} for method in METHODS} | MIXES).items():
        options = OPTIONS | {name: value for name, value in changes.items() if name != "method"}
        method = changes.get("method", "trajectory-shifting")
        for kind, (_, tasks, _) in kinds(0.0).items():
            tasks, place = tasks[:1] if METHODS[method].single else tasks, folder / kind / case
            wet, dry = (partial(build, kinds(dropout)[kind][0], tasks, method, options) for dropout in (0.2, 0.0))
            yield f"{kind}: {case}, loop", run(wet(), 99, place / "loop")
            for name, engine in ({} if case in MIXES else engines(dry())).items():
                yield f"{kind}: {case}, {name}", run(dry(engine), 99, place / name)
            trainer = wet()
            for stop in (trainer.horizon - 2, trainer.horizon, trainer.total_steps - 1, trainer.total_steps):
                yield f"{kind}: {case}, resumed, step {stop}", run(trainer, stop, place / "resumed")
                load(place / "resumed" / f"{stop:09d}", (trainer := wet()).meta_step)


def run(trainer: MetaTrainer, until: int, folder: Path) -> dict[str, str]:
    """Takes inner steps up to the step `until` or the end, and saves a checkpoint there."""
    left = range(min(until, trainer.total_steps) - trainer.step)
    losses = {str(event.step): event.losses for event in (trainer.advance() for _ in left)}
    found = {"losses": digest(losses), "phi": digest(trainer.initialization)} | checkpoint(
        save(folder, trainer.meta_step)
    )
    return found | {"metrics": digest(trainer.metrics())}  # last, as it starts new means


def finetuning() -> Iterator[tuple[str, dict[str, str]]]:
    """From a learned phi and from scratch."""
    for kind, (model, tasks, target) in kinds(0.2).items():
        list(trainer := build(model, tasks, "trajectory-shifting", OPTIONS))
        for start, phi in (("scratch", None), ("phi", trainer.initialization)):
            for statistics in ("reset", "recalibrate"):
                tuned = finetune(phi, target, model=model, **FINETUNE, running_stats=statistics)
                found = {"module": digest(tuned.module.state_dict()), "numbers": digest([tuned.metrics, tuned.curve])}
                yield f"{kind}: fine-tuned from {start}, {statistics}", found


def commands(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`trajshift train`, resumed for a second round, and `trajshift evaluate`."""
    for name, words in RUNS.items():
        path = folder / name
        for line in (
            ["train", "digits", *COMMAND, *words, "rounds=1", f"output.directory={folder}", "--name", name, "--quiet"],
            ["train", str(path), "rounds=2", "--resume", "--quiet"],
            ["evaluate", str(path), "--images", "20,all", "--checkpoints", "--scratch", "--threads", "1"],
        ):
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a mistake is raised all the same
                assert not app(line, standalone_mode=False), line
        yield f"command: {name}", {file: digest(unsealed(file, (path / file).read_bytes(), path)) for file in FILES}
        yield from ((f"command: {name}, step {int(s.name)}", checkpoint(s)) for s in (path / "checkpoints").iterdir())


# -- digests -------------------------------------------------------------------------------------------------
def checkpoint(path: Path) -> dict[str, str]:
    """Of its tensors, and of its manifest but for the checksums of files."""
    said = json.loads((path / "manifest.json").read_text())
    del said["files"], said["checksum"]
    tensors = {f"{file.name}/{n}": t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    return {"tensors": digest(tensors), "manifest": digest(said)}


def digest(value: Any) -> str:
    """SHA-256 of bytes, of named tensors (names, types, shapes, bits), or of a JSON value."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values()):
        value = [(name, str(one.dtype), list(one.shape), digest(one)) for name, one in sorted(value.items())]
    return digest(json.dumps(value, sort_keys=True).encode())


if __name__ == "__main__":
    earlier = Path(sys.argv[2]) if sys.argv[1:2] == ["--compare"] else None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        parts = (training(Path(place)), finetuning(), commands(Path(place)))
        record = {f"{case}, {what}": one for part in parts for case, found in part for what, one in found.items()}
    if earlier is None:
        print(json.dumps(record, indent=1, sort_keys=True))
    else:
        before = json.loads(earlier.read_text())
        differing = sorted(name for name in before.keys() | record.keys() if before.get(name) != record.get(name))
        lines = [f"{name}: {before.get(name, 'absent')} -> {record.get(name, 'absent')}" for name in differing]
        print(*lines, f"{len(record)} digests, {len(differing)} differences", sep="\n")
        sys.exit(bool(differing))
