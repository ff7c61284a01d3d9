"""Chooses rates on mnist by the rule of results/images/README.md, then fine-tunes the targets, study after study.

What tuning.jsonl and rows.jsonl hold is not run again, so a search that was stopped goes on where it was.

Command: python studies/images/search.py DATA [STUDY...]         # two studies at a time, one thread each
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from trajshift.runs.directory import RunDirectory
from trajshift.runs.evaluate_runs import evaluate_runs
from trajshift.runs.sweep import RATES
from trajshift.utils.files import read_jsonl
from trajshift.utils.processes import stop_on_signal

RESULTS = Path(__file__).parents[2] / "results" / "images"
TUNING, CANDIDATES, ROWS = (RESULTS / f"{name}.jsonl" for name in ("tuning", "candidates", "rows"))
FINETUNE_LRS = (0.03, 0.1)
Rates = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One method at one horizon: where its search begins, and how many seeds go to the targets."""

    name: str
    method: str
    horizon: int = 200
    steps: int = 2000
    inner_lr: float = 0.02
    meta_lr: float | None = None
    strength: float | None = None
    """iMAML's lambda; the others have none."""
    order: tuple[str, ...] = ()
    """The rates searched, one after the other; none where they are those of an earlier study."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    overrides: tuple[str, ...] = ()
    images: tuple[int, ...] = (250, 1000)
    finetune_lrs: tuple[float, ...] = FINETUNE_LRS
    every: int | None = None
    """Goes to the targets from phi after each so many inner steps as well."""
    candidate: bool = False
    """Scored on mnist at these rates, as one of the candidates of results/images/README.md."""
    variant: str | None = None
    """One of variants.py."""
    pair: str | None = None
    """Two sources of PAIRS in the place of all eight."""


EARLY = Study(
    name="early",
    method="trajectory-shifting",
    meta_lr=0.1,
    steps=1000,
    images=(1000,),
    finetune_lrs=(0.1,),
    every=200,
)
CANDIDATE = Study(name="candidate", method="trajectory-shifting", meta_lr=0.1, seeds=(), candidate=True)
THREE = (0, 1, 2)
META_FIRST = ("meta_lr", "inner_lr", "meta_lr")
PAIRS = {"alike": "tinyimagenet_a,tinyimagenet_b", "unlike": "tinyimagenet_a,kannada_mnist"}
"""By the cosines of conflict.py, the highest and the lowest with tinyimagenet_a."""
AT_32 = ("data.size=32", "data.crop_padding=4", "autocast=bfloat16")
STUDIES = (
    *(replace(EARLY, name=f"early-{seed}", seeds=(seed,)) for seed in range(5)),
    Study(name="single-task", method="single-task", order=("inner_lr",), overrides=("train_on=[tinyimagenet_a]",)),
    Study(name="horizon-1000", method="trajectory-shifting", horizon=1000, meta_lr=0.02, order=("meta_lr",)),
    Study(name="horizon-20", method="trajectory-shifting", horizon=20, meta_lr=1.0, order=("meta_lr",)),
    Study(name="accurate", method="accurate", horizon=20, steps=200, meta_lr=0.2, seeds=THREE),
    Study(name="horizon-20-short", method="trajectory-shifting", horizon=20, steps=200, meta_lr=0.2, seeds=THREE),
    Study(
        name="single-task-long",
        method="single-task",
        steps=16000,
        inner_lr=0.01,
        overrides=("train_on=[tinyimagenet_a]",),
    ),
    Study(name="random-shifting", method="random-shifting", meta_lr=0.05, order=("inner_lr", "meta_lr")),
    Study(name="leap", method="leap", meta_lr=0.5, order=META_FIRST),
    Study(name="fomaml++", method="fomaml++", meta_lr=0.1, order=META_FIRST),
    Study(name="fomaml", method="fomaml", meta_lr=1.0, order=META_FIRST),
    Study(name="imaml", method="imaml", meta_lr=1.0, strength=0.1, order=("strength", *META_FIRST)),
    Study(name="anil", method="anil", meta_lr=1.0, order=META_FIRST),
    Study(name="reptile-horizon-1000", method="reptile", horizon=1000, meta_lr=2.0, order=("meta_lr",)),
    Study(name="reptile-horizon-20", method="reptile", horizon=20, meta_lr=2.0, order=("meta_lr",)),
    Study(name="size-32", method="trajectory-shifting", meta_lr=0.1, overrides=AT_32),
    Study(name="reptile-size-32", method="reptile", meta_lr=2.0, overrides=AT_32),
    *(
        replace(study, name=f"{study.method}-{pair}", pair=pair, seeds=THREE)
        for pair in PAIRS
        for study in (
            Study(name="", method="trajectory-shifting", meta_lr=0.1, order=("meta_lr",)),
            Study(name="", method="reptile", meta_lr=2.0, order=("meta_lr",)),
            Study(name="", method="mtl", inner_lr=0.2, order=("inner_lr",)),
        )
    ),
    replace(CANDIDATE, name="shifting every 5 steps", meta_lr=0.5, overrides=("meta_every=5",)),
    replace(CANDIDATE, name="shifting, horizon grows", variant="growing-horizon"),
    replace(CANDIDATE, name="shifting, heads renewed", overrides=("renew=[heads]",)),
    replace(CANDIDATE, name="shifting, optimizer renewed", overrides=("renew=[optimizer]",)),
    replace(CANDIDATE, name="shifting, heads first", variant="heads-first"),
    replace(CANDIDATE, name="shifting, tasks weighted by loss", variant="weights-by-loss"),
)


class TrainingFailed(Exception):
    """A training ended with an error, whose text this holds."""


class Diverged(TrainingFailed):
    """A training or fine-tuning stopped at a loss or parameter that is not finite."""


def run(study: Study, rates: Rates, seed: int) -> Path:
    """The run directory of one meta-training, trained or resumed where it is not finished."""
    data = Path(sys.argv[1]).resolve()
    label = "-".join(f"{value:g}" for value in rates.values() if value is not None)
    directory = Path("runs/images") / f"{study.name.replace(', ', '-').replace(' ', '-')}-{label}-{seed}"
    if (directory / "initialization.safetensors").is_file():
        return directory
    command = ["--resume", str(directory)]
    if not RunDirectory(directory).exists:  # not begun, or stopped before its first row
        command = [
            "small-images",
            f"data.root={data}",
            f"method={study.method}",
            f"inner.lr={rates['inner_lr']}",
            f"meta_lr={'null' if rates['meta_lr'] is None else rates['meta_lr']}",
            *([f"metagrad_options.strength={rates['strength']}"] if "strength" in rates else []),
            f"horizon={study.horizon}",
            f"rounds={study.steps // study.horizon}",
            f"seed={seed}",
            "threads=1",
            "output.tensorboard=false",
            f"output.directory={directory.parent}",
            f"output.name={directory.name}",
            f"output.checkpoint_every={study.every or 500}",
            *(("output.keep=null",) if study.every else ()),
            *study.overrides,
            *([f"train_on=[{PAIRS[study.pair]}]"] if study.pair else []),
        ]
    program = (
        ["-m", "trajshift"] if study.variant is None else [str(Path(__file__).with_name("variants.py")), study.variant]
    )
    done = subprocess.run([sys.executable, *program, "train", *command, "--quiet"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise (Diverged if "is not finite" in done.stderr else TrainingFailed)(done.stderr.strip())
    return directory


def fine_tunings(study: Study, rates: Rates, seed: int, rate: float, **options: Any) -> list[dict[str, Any]]:
    """Rows of one run's fine-tunings at one rate."""
    setting = {"study": study.name, "method": study.method, "horizon": study.horizon, **rates, "seed": seed}
    if study.pair:
        setting["pair"] = study.pair
    kept = ("target", "inner_steps", "train_images", "accuracy", "loss")
    found = evaluate_runs([run(study, rates, seed)], overrides=[f"finetune.lr={rate}"], **options)
    for row in found:
        if row.error is not None:
            raise Diverged(row.error)
    # the last checkpoint is phi again
    distinct = dict.fromkeys(tuple(row.to_json()[name] for name in kept) for row in found)
    return [{**setting, "finetune_lr": rate, **dict(zip(kept, values, strict=True))} for values in distinct]


def keep(file: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows in one write, so that two studies may share a file."""
    with open(file, "a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


def score(study: Study, rates: Rates) -> float:
    """Accuracy on mnist, mean of 100, 250 and 1,000 images, at the better fine-tuning rate."""
    file, wanted = TUNING, {"method": study.method, "horizon": study.horizon, **rates}
    if study.candidate:
        label = f"i{rates['inner_lr']:g}-b{rates['meta_lr']:g}"
        file, wanted = CANDIDATES, {"candidate": study.name, "rates": label, "target": "mnist"}

    def known() -> list[dict[str, Any]]:
        rows = [row for row in read_jsonl(file) if row.get("pair") == study.pair]
        return [row for row in rows if wanted.items() <= row.items()]

    for rate in FINETUNE_LRS:
        if sum(row["finetune_lr"] == rate for row in known()) < 3:
            rows = fine_tunings(study, rates, 0, rate, targets="tuning", train_images=[100, 250, 1000])
            keep(file, [wanted | row for row in rows])
    rows = known()
    best = max(sum(row["accuracy"] for row in rows if row["finetune_lr"] == rate) / 3 for rate in FINETUNE_LRS)
    print(f"{study.name} {json.dumps(rates)} {100 * best:.2f}", flush=True)
    return best


def score_with(study: Study, rates: Rates, name: str, value: float) -> float:
    """The score with one rate changed; 0 where training diverges."""
    try:
        return score(study, {**rates, name: value})
    except Diverged as error:
        print(f"{study.name} diverged: {error}", flush=True)
        return 0.0


def climb(score_at: Callable[[float], float], start: float) -> float:
    """The rate of the grid whose neighbours on both sides score no better, uphill from `start`."""
    scored = cache(lambda index: score_at(RATES[index]))
    best, here = -1, RATES.index(start)
    while here != best:
        best = here
        here = max((best, best - 1, best + 1), key=scored)
    return RATES[here]


def work(study: Study) -> None:
    """The whole study; where a training of it fails, the others go on."""
    torch.set_num_threads(1)
    try:
        with stop_on_signal():  # a training under way ends with its worker
            finish(study)
    except TrainingFailed as error:
        print(f"{study.name} stopped: {error}", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)


def finish(study: Study) -> None:
    """Searches the study's rates, then takes its seeds to the targets."""
    rates: Rates = {"inner_lr": study.inner_lr, "meta_lr": study.meta_lr}
    if study.strength is not None:
        rates["strength"] = study.strength
    if study.candidate:
        score(study, rates)
    for name in study.order:
        start = rates[name]
        assert start is not None
        rates[name] = climb(partial(score_with, study, rates, name), start)
    for seed in study.seeds:
        for rate in study.finetune_lrs:
            wanted = {"study": study.name, **rates, "seed": seed, "finetune_lr": rate}
            if not any(wanted.items() <= row.items() for row in read_jsonl(ROWS)):
                options = {"train_images": study.images, "checkpoints": study.every is not None}
                keep(ROWS, fine_tunings(study, rates, seed, rate, **options))
        print(f"{study.name} {json.dumps(rates)} seed {seed} on the targets", flush=True)


if __name__ == "__main__":
    names = [study.name for study in STUDIES]
    unknown = [name for name in sys.argv[2:] if name not in names]
    if len(sys.argv) < 2 or unknown:
        wrong = f"no study {unknown[0]!r}" if unknown else "name the folder of the .npz files"
        print(f"search.py: {wrong}; the studies are {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    chosen = [study for study in STUDIES if study.name in sys.argv[2:] or not sys.argv[2:]]
    ROWS.touch()
    try:
        with stop_on_signal(), get_context("spawn").Pool(2) as pool:
            for _ in pool.imap_unordered(work, chosen, chunksize=1):
                pass
    except KeyboardInterrupt:
        print("search.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
