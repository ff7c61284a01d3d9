"""A grid of runs, each fine-tuned on the recipe's tuning tasks, and the choice among them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trajshift.algorithm.methods import METHODS
from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.evaluation.evaluation_row import FINAL, EvaluationRow
from trajshift.recipes.recipe import Recipe, find, load, split_override
from trajshift.recipes.yaml_text import parse_value
from trajshift.runs.collect_rows import collect
from trajshift.runs.directory import run_name
from trajshift.runs.job import Job
from trajshift.runs.pool import run_jobs
from trajshift.settings import at_least
from trajshift.utils.files import disk_errors, parsed_json, write_json
from trajshift.utils.processes import cores
from trajshift.utils.terminal import console, print_table

Point = tuple[tuple[str, str], ...]
"""One combination of the grid: (field, value as written), fields in alphabetical order."""

RATES = tuple(float(f"{digit}e{power}") for power in range(-9, 3) for digit in (1, 2, 5))
"""Three values a decade, by which a grid is extended."""

NONE = "null"
"""A value left out."""

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
    """`field=a,b,c` words as field -> values; commas inside brackets do not separate. Fields get their short names.

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


def run_sweep(
    recipe: str, words: Sequence[str], *, output: Path | None = None, jobs: int | None = None, extend: bool = False
) -> None:
    """Train and fine-tune the grid, print the table and the choice, and write both to sweep.json.

    `extend` adds the next rate beyond an end of the grid, of 1, 2, 5, 10, ..., while a choice is there. A run that
    diverges counts as a bad result; if one fails for another reason, nothing is chosen.

    Raises:
        UsageError: an impossible grid or recipe, a recipe without tuning tasks, a folder with the choice of another
            sweep, or runs that failed.
    """
    grid = parse_grid(words)
    at_least("--jobs", jobs, 1, "run")
    for field in ("output.directory", "output.name"):
        if field in grid:
            raise UsageError(f"{field} is not for a sweep, which names its runs itself; give --output DIR instead")
    folder = output or Path(load(recipe).output.directory) / f"{find(recipe).stem}-sweep"
    _refuse_to_replace(folder / "sweep.json", grid)
    with disk_errors(folder, option="--output", again="the same command"):
        _sweep(recipe, grid, folder, jobs, extend=extend)


def _sweep(recipe: str, grid: Mapping[str, Sequence[str]], folder: Path, jobs: int | None, *, extend: bool) -> None:
    work: dict[Point, Job] = {}
    failures: dict[Path, UsageError] = {}
    broken: list[UsageError] = []
    more = points_of(grid)
    while more:
        new = grid_jobs(recipe, grid, more, folder)
        where = next(iter(new.values())).recipe
        console().print(
            f"{len(new)} runs of {where.total_steps:,} inner steps per task, then {len(where.tuning)} tuning tasks"
            f" each; runs are in {folder}"
        )
        workers = jobs or (cores() if where.execution.device == "cpu" else 1)
        failures |= run_jobs(list(new.values()), workers=workers, title=folder.name, log=folder / "sweep.log")
        work |= new
        broken = [failure for failure in failures.values() if not isinstance(failure, NonFiniteLoss)]
        results = collect_results(work, failures)
        choices = {} if broken else choose(results)
        more = beyond(choices, results, grid) if extend else []
    _print(results, choices, grid)
    if broken:
        raise UsageError(
            f"{len(broken)} of {len(work)} runs failed, and not because they diverged, so nothing is chosen; rerun"
            f" the same command to try again; the first: {broken[0]}"
        )
    summary = {
        "recipe": find(recipe).stem,
        "horizon": where.horizon,
        "grid": grid,
        "tuning": list(where.tuning),
        "results": [{**asdict(result), "point": dict(result.point)} for result in results],
        "choice": {method: dict(result.point) for method, result in choices.items()},
        "edges": {method: edges(result, results) for method, result in choices.items()},
    }
    write_json(folder / "sweep.json", summary)
    console().print(f"written to {folder / 'sweep.json'}")
    if not choices:
        raise UsageError(f"all runs of the sweep failed; the first: {results[0].failure}")


def _refuse_to_replace(file: Path, grid: Mapping[str, Sequence[str]]) -> None:
    """Refuses to write over the choice of a sweep that tried what this one does not."""
    if not file.exists():
        return
    try:
        old: dict[str, list[str]] = parsed_json(file.read_bytes())["grid"]
        lost = {
            field: values
            for field, values in old.items()
            if field in _varied(old) and not {*values} <= {*grid.get(field, ())}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is not the choice of a sweep ({error}), and would be overwritten; move it, or choose another"
            " --output folder"
        ) from None
    if lost:
        words = " ".join(f"{field}={','.join(values)}" for field, values in lost.items())
        raise UsageError(
            f"{file} contains the choice of a sweep over {words}, which would be lost; name these values too, or choose"
            " another --output folder"
        )


def points_of(grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every combination of the grid; joint training has no meta_lr, and is there once for all of its values."""
    points: list[Point] = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        if "meta_lr" in point and _has_no_meta_lr(point):
            point["meta_lr"] = NONE
        points.append(tuple(point.items()))
    return list(dict.fromkeys(points))


def _has_no_meta_lr(point: Mapping[str, str]) -> bool:
    method = METHODS.get(point.get("method", ""))
    return method is not None and method.joint


def grid_jobs(
    recipe: str, grid: Mapping[str, Sequence[str]], points: Sequence[Point], folder: Path
) -> dict[Point, Job]:
    """One job for each point, its recipe checked; runs are named by the fields with several values."""
    varied = _varied(grid)
    jobs: dict[Point, Job] = {}
    for point in points:
        overrides = [f"{field}={value}" for field, value in point]
        if _has_no_meta_lr(dict(point)):
            overrides.append(f"meta_lr={NONE}")
        loaded = load(recipe, overrides)
        if not loaded.tuning:
            raise UsageError(f"recipe {recipe} has no tasks under tuning, by which a sweep chooses; add one")
        name = ",".join(f"{field}={_file_name(value)}" for field, value in point if field in varied)
        loaded.output = replace(loaded.output, directory=str(folder), name=name)
        jobs[point] = Job(path=folder / run_name(loaded, ""), recipe=loaded, section="tuning")
    return jobs


def _varied(grid: Mapping[str, Sequence[str]]) -> list[str]:
    """The fields with several values."""
    return [field for field, values in grid.items() if len(values) > 1]


def _file_name(value: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in value)


def collect_results(work: Mapping[Point, Job], failures: Mapping[Path, UsageError]) -> list[Result]:
    """One result for each combination, seeds averaged."""
    groups: dict[Point, list[tuple[Job, str]]] = {}
    for point, job in work.items():
        rest = tuple(pair for pair in point if pair[0] != REPEATS)
        groups.setdefault(rest, []).append((job, str(failures.get(job.path, ""))))
    results = []
    for point, members in groups.items():
        failure = next((failure for _, failure in members if failure), "")
        values, steps = [], 0
        for job, _ in members if not failure else []:
            rows, _ = collect([job.path], "tuning", as_asked=True)
            value, failure = _mean(job.recipe, rows)
            steps = max([steps, *(row.inner_steps for row in rows)])
            if failure:
                break
            values.append(value)
        mean = sum(values) / len(values) if values and not failure else None
        results.append(Result(point=point, value=mean, seeds=len(members), inner_steps=steps, failure=failure))
    return results


def _mean(recipe: Recipe, rows: Sequence[EvaluationRow]) -> tuple[float, str]:
    """The mean test metric over a run's tuning tasks, higher is better; or why there is none."""
    size, steps = recipe.finetune.train_images, recipe.finetune.steps
    final = [row for row in rows if row.start == FINAL and (row.train_images, row.steps) == (size, steps)]
    values = []
    for name in recipe.tuning:
        row = next((row for row in final if row.target == name), None)
        if row is None or row.error is not None:
            return 0.0, f"{name} was not fine-tuned" if row is None else str(row.error)
        found = row.metrics
        metric = next((metric for metric in ("accuracy", "mse", "loss") if metric in found), None)
        if metric is None:
            return 0.0, f"{name} has no accuracy, mse or loss to choose by; let its metrics return one of them"
        values.append(found[metric] if metric == "accuracy" else -found[metric])
    return sum(values) / len(values), ""


def choose(results: Sequence[Result]) -> dict[str, Result]:
    """The best result for each method (under "" where the method is no axis)."""
    best: dict[str, Result] = {}
    for result in results:
        method = dict(result.point).get("method", "")
        if result.value is None or not math.isfinite(result.value):
            continue
        if method not in best or result.value > (best[method].value or 0.0):
            best[method] = result
    return best


def ends(result: Result, results: Sequence[Result]) -> list[tuple[str, int]]:
    """Numeric fields whose value in `result` is the least (-1) or the largest (1) that was tried with its method."""
    chosen = dict(result.point)
    rivals = [dict(r.point) for r in results if dict(r.point).get("method") == chosen.get("method")]
    found = []
    for field in chosen:
        tried = list({point[field]: parse_value(point[field]) for point in rivals}.values())
        if len(tried) < 2 or not all(isinstance(value, (int, float)) and value is not True for value in tried):
            continue
        numbers, own = sorted(set(tried)), parse_value(chosen[field])
        found += [(field, way) for end, way in ((numbers[0], -1), (numbers[-1], 1)) if own == end]
    return found


def edges(result: Result, results: Sequence[Result]) -> list[str]:
    """A sentence for each of `ends`."""
    words = {-1: ("smallest", "smaller"), 1: ("largest", "larger")}
    return [
        f"{field}={dict(result.point)[field]} is the {words[way][0]} tried: the best may lie beyond, extend the grid "
        f"by a {words[way][1]} one"
        for field, way in ends(result, results)
    ]


def beyond(choices: Mapping[str, Result], results: Sequence[Result], grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """The points that follow each choice beyond an end of its rates, with every seed."""
    points: list[Point] = []
    for result in choices.values():
        for field, way in ends(result, results):
            rate = _next_rate(float(dict(result.point)[field]), way) if field.endswith("lr") else None
            if rate is not None:
                moved = {**dict(result.point), field: rate}
                axes = {name: [moved[name]] if name in moved else values for name, values in grid.items()}
                points += points_of(axes)
    return points


def _next_rate(rate: float, way: int) -> str | None:
    """The next of 1, 2, 5, 10, ... and their tenths above or below; None where there is none."""
    further = [other for other in RATES[::way] if way * (other / rate - 1) > 1e-9]
    return f"{further[0]:g}" if further else None


def _print(results: Sequence[Result], choices: Mapping[str, Result], grid: Mapping[str, Sequence[str]]) -> None:
    fields = sorted((field for field in _varied(grid) if field != REPEATS), key=lambda field: field != "method")
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


def _show(value: float) -> str:
    return f"{100 * value:.2f} %" if value >= 0 else f"{-value:.4f}"


def _words(point: Point) -> str:
    return " ".join(f"{field}={value}" for field, value in point)
