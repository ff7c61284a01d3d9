"""A grid of runs, each fine-tuned on the recipe's tuning tasks, and the choice among them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError
from trajshift.pool import Job, cores, run_jobs
from trajshift.recipe import Recipe, find, load, split_override
from trajshift.rundir import replace_file, run_name
from trajshift.tables import console, print_table
from trajshift.yaml_text import parse_value

Point = tuple[tuple[str, str], ...]
"""One combination of the grid: (field, value as written), fields in alphabetical order."""

REPEATS = "seed"
"""The axis that is averaged over; one choice is made for each value of `method`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One combination without its seed."""

    point: Point
    value: float | None
    """Test accuracy (or another metric), mean over seeds of the mean over tuning tasks; None where a run failed."""
    seeds: int
    inner_steps: int
    failure: str = ""


def parse_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """`field=a,b,c` words as field -> values; commas inside brackets do not separate.

    Raises:
        UsageError: no word, one that is not of this form, or a field or value given twice.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        path, text = split_override(word)
        field = ".".join(path)
        values = split_values(text)
        if field in grid:
            raise UsageError(f"{field} is given twice; write its values in one word, such as {field}=a,b,c")
        if "" in values or len(set(values)) < len(values):
            raise UsageError(f"{word!r} has an empty or a repeated value; write {field}=a,b,c")
        grid[field] = values
    if not any(len(values) > 1 for values in grid.values()):
        raise UsageError("a sweep needs a field with several values, such as meta_lr=0.01,0.03,0.1")
    return dict(sorted(grid.items()))


def split_values(text: str) -> list[str]:
    """Split at commas that are not inside brackets."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def run_sweep(recipe: str, words: Sequence[str], *, output: Path | None = None, jobs: int | None = None) -> None:
    """Train and fine-tune the grid, print the table and the choice, and write both to sweep.json.

    Raises:
        UsageError: a grid or recipe that cannot be, a recipe without tuning tasks, or no run that succeeded.
    """
    grid = parse_grid(words)
    folder = output or Path(load(recipe).output.directory) / f"{find(recipe).stem}-sweep"
    work = grid_jobs(recipe, grid, folder)
    where = next(iter(work.values())).recipe
    workers = jobs or (cores() if where.device == "cpu" else 1)
    failures = run_jobs(list(work.values()), workers=workers, title=folder.name, log=folder / "sweep.log")
    results = collect_results(work, failures)
    choices = choose(results)
    summary = {
        "recipe": str(recipe),
        "grid": grid,
        "tuning": list(where.tuning),
        "results": [{**asdict(result), "point": dict(result.point)} for result in results],
        "choice": {method: dict(result.point) for method, result in choices.items()},
    }
    replace_file(folder / "sweep.json", json.dumps(summary, indent=1) + "\n")
    _print(results, choices, grid, folder)
    if not choices:
        raise UsageError(f"all runs of the sweep failed; the first: {results[0].failure}")


def grid_jobs(recipe: str, grid: Mapping[str, Sequence[str]], folder: Path) -> dict[Point, Job]:
    """One job for each combination of values, its recipe checked."""
    jobs: dict[Point, Job] = {}
    for values in itertools.product(*grid.values()):
        point = tuple(zip(grid, values, strict=True))
        loaded = load(recipe, [f"{field}={value}" for field, value in point])
        if not loaded.tuning:
            raise UsageError(f"recipe {recipe} has no tasks under tuning, by which a sweep chooses; add one")
        name = ",".join(f"{field}={_file_name(value)}" for field, value in point)
        loaded.output = replace(loaded.output, directory=str(folder), name=name)
        jobs[point] = Job(path=folder / run_name(loaded, ""), recipe=loaded, section="tuning")
    return jobs


def _file_name(value: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in value)


def collect_results(work: Mapping[Point, Job], failures: Mapping[Path, str]) -> list[Result]:
    """One result for each combination, seeds averaged."""
    from trajshift.evaluate import collect

    groups: dict[Point, list[tuple[Job, str]]] = {}
    for point, job in work.items():
        rest = tuple(pair for pair in point if pair[0] != REPEATS)
        groups.setdefault(rest, []).append((job, failures.get(job.path, "")))
    results = []
    for point, members in groups.items():
        failure = next((failure for _, failure in members if failure), "")
        values, steps = [], 0
        for job, _ in members if not failure else []:
            rows, _ = collect([job.path], "tuning")
            value, failure = _mean(job.recipe, rows)
            steps = max([steps, *(row["inner_steps"] for row in rows)])
            if failure:
                break
            values.append(value)
        mean = sum(values) / len(values) if values and not failure else None
        results.append(Result(point=point, value=mean, seeds=len(members), inner_steps=steps, failure=failure))
    return results


def _mean(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """The mean test metric over a run's tuning tasks, higher is better; or why there is none."""
    size, steps = recipe.finetune.train_images, recipe.finetune.steps
    final = [
        row
        for row in rows
        if row["checkpoint"] == "initialization" and (row["train_images"], row["steps"]) == (size, steps)
    ]
    values = []
    for name in recipe.tuning:
        row = next((row for row in final if row["target"] == name), None)
        if row is None or "error" in row:
            return 0.0, row["error"] if row else f"{name} was not fine-tuned"
        values.append(row["accuracy"] if "accuracy" in row else -row.get("mse", row["loss"]))
    return sum(values) / len(values), ""


def choose(results: Sequence[Result]) -> dict[str, Result]:
    """The best result for each method (under "" where the method is no axis)."""
    best: dict[str, Result] = {}
    for result in results:
        method = dict(result.point).get("method", "")
        if result.value is not None and (method not in best or result.value > (best[method].value or 0.0)):
            best[method] = result
    return best


def edges(result: Result, results: Sequence[Result]) -> list[str]:
    """For each numeric field whose best value is the least or the largest tried: a sentence."""
    chosen = dict(result.point)
    rivals = [dict(r.point) for r in results if dict(r.point).get("method") == chosen.get("method")]
    found = []
    for field, text in chosen.items():
        if field == "method":
            continue
        tried = {point[field]: parse_value(point[field]) for point in rivals}
        numbers = sorted(value for value in tried.values() if isinstance(value, (int, float)) and value is not True)
        if len(numbers) < 2 or len(numbers) < len(tried):
            continue
        for end, word, way in ((numbers[0], "smallest", "smaller"), (numbers[-1], "largest", "larger")):
            if tried[text] == end:
                found.append(
                    f"{field}={text} is the {word} tried: the best may lie beyond, extend the grid by a {way} one"
                )
    return found


def _print(
    results: Sequence[Result], choices: Mapping[str, Result], grid: Mapping[str, Sequence[str]], folder: Path
) -> None:
    fields = sorted((field for field in grid if field != REPEATS), key=lambda field: field != "method")
    rows = []
    for result in sorted(results, key=lambda result: dict(result.point).get("method", "")):
        point = dict(result.point)
        best = "best" if result in choices.values() else ""
        value = "failed" if result.value is None else _show(result.value)
        rows.append([*(point[field] for field in fields), value, str(result.seeds), f"{result.inner_steps:,}", best])
    header = [*fields, "test accuracy", "seeds", "inner steps", ""]
    if any(result.value is not None and result.value < 0 for result in results):
        header[len(fields)] = "test error"
    print_table(header, rows, "fine-tuned on the tuning tasks, mean over tasks and seeds", text=len(fields))
    out = console()
    for result in results:
        if result.failure:
            out.print(f"failed: {_words(result.point)}: {result.failure}")
    for result in choices.values():
        out.print(f"choice: {_words(result.point)}")
        for edge in edges(result, results):
            out.print(f"  {edge}")
    out.print(f"written to {folder / 'sweep.json'}")


def _show(value: float) -> str:
    return f"{100 * value:.2f} %" if value >= 0 else f"{-value:.4f}"


def _words(point: Point) -> str:
    return " ".join(f"{field}={value}" for field, value in point)
