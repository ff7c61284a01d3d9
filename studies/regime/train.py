"""Trains the four methods side by side in the paper's regime, as far as the time allows.

    python -m studies.regime.train DATA OUT --tune --minutes 9     # chooses rates, then trains in the time left
    python -m studies.regime.train DATA OUT --minutes 9            # trains with the rates chosen before

A run is one method and one seed: 20 rounds of K = 1000 steps. Runs are taken seed by seed, the methods in turn, and one
that no longer fits in the time left is not begun. What OUT contains is not repeated, so the same command continues on
the next loan. OUT gets runs.jsonl (a line for each finished run), tuning.jsonl (a line for each pair of rates tried)
and phi/ (safetensors after rounds 1, 2, 5, 10 and 20). Only the two .jsonl files are needed to continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from studies.command import new_app, resumable, run_app
from studies.regime.budget import Budget, run_seconds, trial_seconds
from studies.regime.meta_training import NoTimeLeft, Trained, meta_train, release
from studies.regime.rates import Rates, ScoreMissing, choose, parse_rates
from studies.regime.setting import (
    METHODS,
    REGIME,
    SOURCES,
    TUNING,
    Regime,
    Size,
    build_image_task,
    parse_size,
    show_size,
)
from trajshift.errors import NonFiniteLoss, UsageError, nearest
from trajshift.evaluation.finetuning import finetune
from trajshift.task import Task
from trajshift.utils.environment import environment
from trajshift.utils.files import append_row, read_jsonl
from trajshift.utils.progress import duration


@dataclass(frozen=True, kw_only=True)
class Loan:
    """One command: the images, where the results go, and the time there is."""

    data: Path
    out: Path
    size: Size
    device: str
    commit: str | None
    budget: Budget
    regime: Regime

    @cached_property
    def sources(self) -> list[Task]:
        """The eight sources, loaded once."""
        return [build_image_task(name, self.data, self.size) for name in SOURCES]

    @cached_property
    def tuning_task(self) -> Task:
        """The task that rates are chosen by."""
        return build_image_task(TUNING, self.data, self.size)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What every row states: size, length and where it was made."""
        made = environment()
        cuda = self.device.startswith("cuda")
        return {
            "size": show_size(self.size),
            "horizon": self.regime.horizon,
            "batch_size": self.regime.batch_size,
            "device": torch.cuda.get_device_name(self.device) if cuda else made["processor"],
            "torch": torch.__version__,
            "commit": self.commit or made["commit"],
        }

    def tried(self) -> list[dict[str, Any]]:
        """The pairs of rates tried at this size."""
        return self._alike("tuning.jsonl")

    def done(self) -> list[dict[str, Any]]:
        """The finished runs at this size."""
        return self._alike("runs.jsonl")

    def _alike(self, file: str) -> list[dict[str, Any]]:
        names = ("size", "horizon", "batch_size")
        rows = read_jsonl(self.out / file, {"method": str, "size": str})
        return [row for row in rows if all(row[name] == self.about[name] for name in names)]

    # -- rates ---------------------------------------------------------------------------------------------------

    def choose(self, method: str) -> Rates:
        """The method's rates by what was tried.

        Raises:
            ScoreMissing: names the next rates to try.
        """
        rows = [row for row in self.tried() if row["method"] == method]
        return choose(method, {Rates(row["inner_lr"], row["meta_lr"]): row["score"] for row in rows})

    def tune(self, methods: Sequence[str]) -> bool:
        """Tries rates, the methods in turn, until all are chosen; False where the time was up before."""
        open_methods = list(methods)
        while open_methods:
            for method in tuple(open_methods):
                try:
                    print(f"{method}: {self.choose(method)}", flush=True)
                    open_methods.remove(method)
                except ScoreMissing as missing:
                    wanted = {"size": self.about["size"], "device": self.about["device"]}
                    if not self.budget.fits(trial_seconds(self.tried(), **wanted)):
                        return False
                    try:
                        self.try_rates(method, missing.rates)
                    except NoTimeLeft:
                        return False
        return True

    def try_rates(self, method: str, rates: Rates) -> None:
        """Adds to tuning.jsonl: a short run of seed 0, fine-tuned on the tuning task; 0 where it diverges."""
        regime, before = self.regime, self.budget.left()
        row: dict[str, Any] = {"method": method, **rates._asdict(), **self.about, "seed": 0}
        row |= {"steps": regime.tuning_rounds * regime.horizon, "target": TUNING}
        try:
            trained = self.meta_train(method, rates, 0, regime.tuning_rounds, (regime.tuning_rounds,))
            row |= trained.timing()
            row["accuracy"] = {str(lr): self.accuracy(trained, lr) for lr in regime.finetune_lrs}
            row["score"] = max(row["accuracy"].values())
        except NonFiniteLoss as error:
            row |= {"error": str(error), "score": 0.0}
        row["trial_seconds"] = round(before - self.budget.left(), 2)
        release(self.device)
        append_row(self.out / "tuning.jsonl", row)
        print(f"tried {method}, {rates}: {100 * row['score']:.2f}% on {TUNING}", flush=True)

    def accuracy(self, trained: Trained, lr: float) -> float:
        """Test accuracy on the tuning task after fine-tuning at one rate; 0 where that diverges."""
        (phi,) = trained.phis.values()
        try:
            model, settings = self.regime.factory(), self.regime.finetune(lr)
            return finetune(phi, self.tuning_task, settings, model=model, device=self.device).metrics["accuracy"]
        except NonFiniteLoss:
            return 0.0

    # -- runs ----------------------------------------------------------------------------------------------------

    def meta_train(self, method: str, rates: Rates, seed: int, rounds: int, kept: Sequence[int]) -> Trained:
        """See `studies.regime.meta_training`."""
        return meta_train(
            self.sources, method, rates, self.regime,
            seed=seed, device=self.device, rounds=rounds, kept=kept, fits=self.budget.fits,
        )  # fmt: skip

    def train(self, methods: Sequence[str], seeds: Sequence[int], rates: Mapping[str, Rates], tuned: set[str]) -> None:
        """Adds the missing runs to runs.jsonl, as long as the next one fits."""
        jobs = list(balanced(methods, seeds))
        missing = [job for job in jobs if not self.is_done(*job, rates[job[0]])]
        for done, (method, seed) in enumerate(missing, start=len(jobs) - len(missing)):
            expected = self.expected_seconds(method)
            try:
                if not self.budget.fits(expected):
                    raise NoTimeLeft
                self.train_one(method, seed, rates[method], method in tuned)
            except NoTimeLeft:
                takes = "takes longer" if expected is None else f"takes about {duration(expected)}"
                print(
                    f"{done} of {len(jobs)} runs are done; the next, {method} of seed {seed}, {takes} and"
                    f" {duration(max(self.budget.left(), 0.0))} is left; rerun the same command to resume"
                )
                return
        print(f"all {len(jobs)} runs are done")

    def expected_seconds(self, method: str) -> float | None:
        """What a run takes, by the trials and runs before."""
        steps = self.regime.rounds * self.regime.horizon
        wanted = {"size": self.about["size"], "device": self.about["device"], "method": method}
        return run_seconds([*self.tried(), *self.done()], steps, **wanted)

    def is_done(self, method: str, seed: int, rates: Rates) -> bool:
        """Whether runs.jsonl has the run.

        Raises:
            UsageError: it has it at other rates.
        """
        for row in self.done():
            if (row["method"], row["seed"], row["rounds"]) == (method, seed, self.regime.rounds):
                before = Rates(row["inner_lr"], row["meta_lr"])
                if before != rates:
                    raise UsageError(
                        f"{self.out} contains {method} of seed {seed} at {before}, not {rates}; name another OUT"
                    )
                return True
        return False

    def train_one(self, method: str, seed: int, rates: Rates, tuned: bool) -> None:
        """One run: its phis, then its line in runs.jsonl."""
        regime = self.regime
        row: dict[str, Any] = {"method": method, "seed": seed, **rates._asdict(), "tuned": tuned}
        row |= {**self.about, "rounds": regime.rounds, "environment": environment()}
        try:
            trained = self.meta_train(method, rates, seed, regime.rounds, regime.kept)
        except NonFiniteLoss as error:
            append_row(self.out / "runs.jsonl", row | {"error": str(error)})
            release(self.device)
            print(f"{method}, seed {seed}: {error}", flush=True)
            return
        row |= {**trained.timing(), "engine": trained.engine, "gradient_evaluations": trained.gradient_evaluations}
        row["phi"] = {}
        for step, phi in trained.phis.items():
            name = f"phi/{self.about['size']}-{method}-{seed}-{step}.safetensors"
            phi.save(self.out / name)
            row["phi"][str(step)] = name
        append_row(self.out / "runs.jsonl", row | {"curve": trained.curve})
        print(
            f"{method}, seed {seed}: {duration(trained.seconds)}, {1e3 * trained.step_seconds:.2f} ms a step",
            flush=True,
        )
        del trained
        release(self.device)


def balanced(methods: Iterable[str], seeds: Iterable[int]) -> Iterator[tuple[str, int]]:
    """Seed by seed, the methods in turn: however many are done, no method has two runs more than another."""
    methods = tuple(methods)
    for seed in seeds:
        for method in methods:
            yield method, seed


# -- the command -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of the .npz files, packed or not.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results; its content is kept.")],
    size: Annotated[str, typer.Option(help="Pixels of all images, or native: each task's own.")] = "32",
    minutes: Annotated[
        float, typer.Option(min=0, help="From the start of the command; no run begins that ends later.")
    ] = 9.0,
    tune: Annotated[bool, typer.Option("--tune", help="First choose the rates missing in OUT/tuning.jsonl.")] = False,
    methods: Annotated[str, typer.Option(help="Joined by commas.")] = ",".join(METHODS),
    seeds: Annotated[str, typer.Option(help="Joined by commas.")] = "0,1,2",
    rates: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=INNER[,META]", help="Rates that replace tuned ones; their rows say untuned."),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="What the rows state where the checkout has no history.")] = None,
) -> None:
    """Train trajectory shifting, Reptile, joint training and no-shifting side by side in the paper's regime."""
    budget = Budget(minutes)
    names, numbers, given = parse_methods(methods), parse_seeds(seeds), parse_rates(rates or [])
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} is not available on this machine; use --device cpu")
    if not data.is_dir():
        raise UsageError(f"there is no folder {data}; name the folder of the .npz files")
    loan = Loan(
        data=data, out=out, size=parse_size(size), device=device, commit=commit, budget=budget, regime=REGIME
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    to_tune = [name for name in names if name not in given]
    with resumable():
        if tune and not loan.tune(to_tune):
            print("the time is up before all rates are chosen; rerun the same command to resume")
            return
        loan.train(names, numbers, tuned_rates(loan, to_tune) | given, set(to_tune))


def tuned_rates(loan: Loan, methods: Sequence[str]) -> dict[str, Rates]:
    """The rates chosen for the methods.

    Raises:
        UsageError: a search is not finished.
    """
    found = {}
    for method in methods:
        try:
            found[method] = loan.choose(method)
        except ScoreMissing:
            raise UsageError(
                f"{loan.out / 'tuning.jsonl'} lacks trials that choosing the rates of {method} needs at size "
                f"{show_size(loan.size)}; use --tune, or --rates {method}=... for a run that is stated as untuned"
            ) from None
    return found


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of a list joined by commas.

    Raises:
        UsageError: an unknown one; names the nearest.
    """
    found = tuple(dict.fromkeys(text.split(",")))
    for name in found:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r} here{nearest(name, METHODS)}")
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a list joined by commas.

    Raises:
        UsageError: something that is not a number.
    """
    if not all(word.isdecimal() for word in text.split(",")):
        raise UsageError(f"seeds are {text!r}; join numbers by commas, such as 0,1,2")
    return tuple(dict.fromkeys(map(int, text.split(","))))


if __name__ == "__main__":
    run_app(app, "studies.regime.train")
