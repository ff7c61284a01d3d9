"""Chooses rates on mnist by the rule of results/images/README.md, then fine-tunes the targets, study after study.

    python -m studies.images.search DATA [STUDY...]       # all studies, two at a time, one thread each

Trainings and fine-tunings that are there already (runs/images, tuning.jsonl, candidates.jsonl, rows.jsonl) are not done
again, so rerunning the same command resumes a search that was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from studies.command import new_app, resumable, run_app
from studies.images.catalogue import PAIRS, STUDIES, Study
from studies.images.rows import RATES as FINETUNE_LRS
from studies.images.rows import RESULTS
from studies.images.variants import VARIANTS
from trajshift.errors import NonFiniteLoss, UsageError, nearest
from trajshift.recipes.recipe import load
from trajshift.runs.directory import RunDirectory
from trajshift.runs.evaluate_runs import evaluate_runs
from trajshift.runs.sweep import RATES
from trajshift.runs.train import train
from trajshift.utils.files import read_jsonl
from trajshift.utils.processes import stop_on_signal

TUNING_IMAGES = (100, 250, 1000)
Rates = dict[str, float | None]


class Diverged(Exception):
    """A training or fine-tuning stopped at a loss or parameter that is not finite."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One study and where its files are."""

    study: Study
    data: Path
    """Folder of the .npz files."""
    results: Path
    """Folder of tuning.jsonl, candidates.jsonl and rows.jsonl."""
    runs: Path
    """Folder of the run directories."""

    def finish(self) -> None:
        """Searches the study's rates, then takes its seeds to the targets."""
        study = self.study
        rates: Rates = {"inner_lr": study.inner_lr, "meta_lr": study.meta_lr}
        if study.strength is not None:
            rates["strength"] = study.strength
        if study.candidate:
            self.score(rates)
        for name in study.order:
            start = rates[name]
            assert start is not None
            rates[name] = climb(lambda value, name=name: self.score_with(rates, name, value), start)  # type: ignore[misc]
        for seed in study.seeds:
            self.take_to_targets(rates, seed)

    def take_to_targets(self, rates: Rates, seed: int) -> None:
        """Adds the missing rows of one seed to rows.jsonl."""
        study, rows = self.study, self.results / "rows.jsonl"
        for rate in study.finetune_lrs:
            wanted = {"study": study.name, **rates, "seed": seed, "finetune_lr": rate}
            if not any(wanted.items() <= row.items() for row in read_jsonl(rows)):
                every = study.every is not None
                append_rows(rows, self.fine_tunings(rates, seed, rate, train_images=study.images, checkpoints=every))
        print(f"{study.name} {json.dumps(rates)} seed {seed} on the targets", flush=True)

    def score_with(self, rates: Rates, name: str, value: float) -> float:
        """The score with one rate changed; 0 where training diverges."""
        try:
            return self.score({**rates, name: value})
        except Diverged as error:
            print(f"{self.study.name} diverged: {error}", flush=True)
            return 0.0

    def score(self, rates: Rates) -> float:
        """Accuracy on mnist, mean over `TUNING_IMAGES`, at the better fine-tuning rate."""
        study = self.study
        file, wanted = self.results / "tuning.jsonl", {"method": study.method, "horizon": study.horizon, **rates}
        if study.candidate:
            label = f"i{rates['inner_lr']:g}-b{rates['meta_lr']:g}"
            file, wanted = (
                self.results / "candidates.jsonl",
                {"candidate": study.name, "rates": label, "target": "mnist"},
            )

        def known(rate: float) -> list[dict[str, Any]]:
            rows = [row for row in read_jsonl(file) if (row.get("pair"), row["finetune_lr"]) == (study.pair, rate)]
            return [row for row in rows if wanted.items() <= row.items()]

        for rate in FINETUNE_LRS:
            if len(known(rate)) < len(TUNING_IMAGES):
                rows = self.fine_tunings(rates, 0, rate, targets="tuning", train_images=TUNING_IMAGES)
                append_rows(file, [wanted | row for row in rows])
        best = max(sum(row["accuracy"] for row in known(rate)) / len(TUNING_IMAGES) for rate in FINETUNE_LRS)
        print(f"{study.name} {json.dumps(rates)} {100 * best:.2f}", flush=True)
        return best

    def fine_tunings(self, rates: Rates, seed: int, rate: float, **options: Any) -> list[dict[str, Any]]:
        """Rows of one run's fine-tunings at one rate; the run is trained first if it is not finished."""
        study = self.study
        setting = {"study": study.name, "method": study.method, "horizon": study.horizon, **rates, "seed": seed}
        if study.pair:
            setting["pair"] = study.pair
        kept = ("target", "inner_steps", "train_images", "accuracy", "loss")
        found = evaluate_runs([self.trained(rates, seed)], overrides=[f"finetune.lr={rate}"], **options)
        for row in found:
            if row.error is not None:
                raise Diverged(row.error)
        # the last checkpoint is the final phi once more
        distinct = dict.fromkeys(tuple(row.to_json()[name] for name in kept) for row in found)
        return [{**setting, "finetune_lr": rate, **dict(zip(kept, values, strict=True))} for values in distinct]

    def trained(self, rates: Rates, seed: int) -> Path:
        """The directory of one meta-training, trained or resumed if it is not finished.

        Raises:
            Diverged: a loss or parameter was not finite.
            KeyboardInterrupt: a signal stopped the training, which saved a checkpoint.
        """
        label = "-".join(f"{value:g}" for value in rates.values() if value is not None)
        directory = self.runs / f"{self.study.name.replace(', ', '-').replace(' ', '-')}-{label}-{seed}"
        run = RunDirectory(directory)
        if run.initialization.is_file():
            return directory
        recipe = run.recipe() if run.exists else load("small-images", self.overrides(rates, seed))
        variant = self.study.variant
        try:
            with nullcontext() if variant is None else VARIANTS[variant]():
                outcome = train(recipe, directory, resume=run.exists, quiet=True)
        except NonFiniteLoss as error:
            raise Diverged(str(error)) from None
        if not outcome.complete:
            raise KeyboardInterrupt
        return directory

    def overrides(self, rates: Rates, seed: int) -> list[str]:
        """What the recipe of one meta-training changes in small-images."""
        study = self.study
        return [
            f"data.root={self.data.resolve()}",
            f"method={study.method}",
            f"inner.lr={rates['inner_lr']}",
            f"meta_lr={'null' if rates['meta_lr'] is None else rates['meta_lr']}",
            *([f"metagrad_options.strength={rates['strength']}"] if "strength" in rates else []),
            f"horizon={study.horizon}",
            f"rounds={study.steps // study.horizon}",
            f"seed={seed}",
            "threads=1",
            "output.tensorboard=false",
            f"output.checkpoint_every={study.every or 500}",
            *(("output.keep=null",) if study.every else ()),
            *study.overrides,
            *([f"train_on=[{PAIRS[study.pair]}]"] if study.pair else []),
        ]


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows in one write, so that two studies may share a file."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


def climb(score_at: Callable[[float], float], start: float) -> float:
    """The rate of the grid whose neighbours on both sides score no better, uphill from `start`."""
    scored = cache(lambda index: score_at(RATES[index]))
    best, here = -1, RATES.index(start)
    while here != best:
        best = here
        here = max((best, best - 1, best + 1), key=scored)
    return RATES[here]


def work(search: Search) -> None:
    """The whole study; if one of its trainings fails, the other studies continue."""
    torch.set_num_threads(1)
    try:
        search.finish()
    except (Diverged, UsageError) as error:
        print(f"{search.study.name} stopped: {error}", flush=True)


def _work_in_process(search: Search) -> None:
    """As `work`, in a process that a signal to its parent ends."""
    try:
        with stop_on_signal():
            work(search)
    except KeyboardInterrupt:
        sys.exit(130)


def work_all(searches: Sequence[Search], processes: int) -> Iterator[None]:
    """Works on all studies, this many at a time; yields after each."""
    if processes == 1:
        yield from map(work, searches)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_work_in_process, searches, chunksize=1)


# -- the command -----------------------------------------------------------------------------------------------

app = new_app()
NAMES = [study.name for study in STUDIES]


@app.command(help=f"Search the rates of studies and fine-tune the targets. STUDY is one of: {'; '.join(NAMES)}.")
def search(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of the twelve .npz files.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="STUDY", help="Default: all studies.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Studies at a time, one thread each.")] = 2,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/images"),
) -> None:
    """Works on the studies named."""
    for name in names or ():
        if name not in NAMES:
            raise UsageError(f"there is no study {name!r}{nearest(name, NAMES)}")
    if not data.is_dir():
        raise UsageError(f"there is no folder {data}; name the folder of the .npz files")
    results.mkdir(parents=True, exist_ok=True)
    chosen = [study for study in STUDIES if study.name in names] if names else STUDIES
    with resumable():
        for _ in work_all([Search(study=s, data=data, results=results, runs=runs) for s in chosen], processes):
            pass


if __name__ == "__main__":
    run_app(app, "studies.images.search")
