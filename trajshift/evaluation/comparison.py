"""From rows of `evaluation.jsonl` to tables and curves; torch-free.

One row is one fine-tuning: `checkpoint` ("initialization", a step, "scratch" or "initial weights"), `inner_steps` of
meta-training per task behind it, `method`, `label`, `seed`, `target`, `train_images` (null: all) and `images`
(how many that were), `steps` of fine-tuning, `setting` (digest of model, target and fine-tuning options),
`phi` (digest of the file), then the test metrics, or `error` where fine-tuning broke down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajshift.errors import UsageError
from trajshift.evaluation.statistics import Estimate, PairedTest, compare, interval, show

Row = dict[str, Any]

SCRATCH = "scratch"
START = "initial weights"
UNTRAINED = (SCRATCH, START)
"""Starts without meta-training: none, or what the recipe's phi starts from. They are labels of their own."""
FINAL = "initialization"
AVERAGE = "average of targets"
"""Beside the targets' names."""
_IGNORED = (
    "seed", "output", "device", "workers", "threads", "engine", "channels_last", "data.root", "finetune", "targets",
    "tuning",
)  # fmt: skip
"""Fields that make no other label: a label is averaged over seeds, and the others do not change phi."""
_PREFERRED = ("accuracy", "mse", "loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One method in a `Summary`."""

    label: str
    method: str
    inner_steps: int
    """Cumulative inner steps of meta-training per task."""
    seeds: tuple[int, ...]
    """Seeds with every target, behind `average` and the tests."""
    targets: dict[str, Estimate]
    """Per target, over the seeds that have it; a target with a failed fine-tuning has none."""
    average: Estimate | None
    """Over seeds, targets averaged within each seed first."""
    per_seed: dict[int, float]
    """The values behind `average`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Methods x targets at one number of training images, with paired tests on the averages."""

    metric: str
    """`accuracy` (a fraction; shown in %), `mse` or `loss`."""
    train_images: int | None
    """Training images per target; `None`: all of them."""
    steps: tuple[int, ...]
    """Fine-tuning steps; more than one value where rows were mixed (a note says so)."""
    targets: tuple[str, ...]
    lines: tuple[Line, ...]
    tests: tuple[PairedTest, ...]
    """Every pair, or every method against the reference; one Holm family."""
    notes: tuple[str, ...] = field(default=())
    """What the reader must know: missing seeds, failures, mixed settings."""

    @property
    def percent(self) -> bool:
        """Whether numbers are shown in percent."""
        return self.metric == "accuracy"

    @property
    def title(self) -> str:
        """One line above the table."""
        images = "all training images" if self.train_images is None else f"{self.train_images} training images"
        steps = "/".join(map(str, self.steps))
        unit = " in %" if self.percent else ""
        return f"test {self.metric}{unit} after {steps} fine-tuning steps with {images} per target"

    def header(self) -> list[str]:
        """Column names for `cells`."""
        return [
            "method",
            *self.targets,
            *(["average"] if len(self.targets) > 1 else []),
            "seeds",
            "inner steps",
        ]

    def cells(self) -> list[list[str]]:
        """The table as text, a list per method: mean +- half width of the 95% t-interval over seeds."""
        rows = []
        for line in self.lines:
            shown = [self.show(line.targets.get(target)) for target in self.targets]
            average = [self.show(line.average)] if len(self.targets) > 1 else []
            rows.append([line.label, *shown, *average, str(len(line.seeds)), f"{line.inner_steps:,}"])
        return rows

    def test_header(self) -> list[str]:
        """Column names for `test_cells`."""
        return ["first", "second", "difference", "seeds", "t", "p", "p (Holm)"]

    def test_cells(self) -> list[list[str]]:
        """The paired tests as text; a pair without a test says why in the place of t."""
        rows = []
        for test in self.tests:
            numbers = (
                [str(test.reason), "", ""]
                if test.t is None or test.p is None or test.p_holm is None
                else [f"{test.t:.2f}", show_p(test.p), show_p(test.p_holm)]
            )
            difference = self.show(test.difference, signed=True)
            rows.append([test.first, test.second, difference, str(test.count), *numbers])
        return rows

    def show(self, estimate: Estimate | None, *, signed: bool = False) -> str:
        """`71.3 +- 0.4` in percent, `0.213 +- 0.004` else; `-` for none."""
        return show(estimate, 2, 100.0, signed=signed) if self.percent else show(estimate, 4, signed=signed)


def show_p(p: float) -> str:
    """A p-value with two digits that count; below 1e-4 only that."""
    return "<0.0001" if p < 1e-4 else f"{p:#.2g}"


def summary_table(
    rows: Iterable[Row],
    *,
    train_images: int | None = None,
    steps: int | None = None,
    metric: str | None = None,
    reference: str | None = None,
    confidence: float = 0.95,
) -> Summary:
    """Methods x targets at the end of meta-training, at one number of training images.

    `metric` None takes accuracy where the rows have it, then mse, then loss. `reference` tests that method
    against each other one instead of every pair.

    Raises:
        UsageError: no such rows, or two runs give one method the same seed.
    """
    chosen = [
        row
        for row in rows
        if row["checkpoint"] in (FINAL, *UNTRAINED)
        and row.get("train_images") == train_images
        and (steps is None or row["steps"] == steps)
    ]
    if not chosen:
        images = "all training images" if train_images is None else f"train_images={train_images}"
        raise UsageError(f"there are no evaluation rows with {images}; run trajshift evaluate first")
    metric = metric or pick_metric(chosen)
    targets = tuple(dict.fromkeys(row["target"] for row in chosen))
    notes = _unlike(chosen)
    lines = []
    for label in _ordered(chosen):
        line, remarks = _line(label, [row for row in chosen if row["label"] == label], targets, metric, confidence)
        lines.append(line)
        notes += remarks
    values = {line.label: line.per_seed for line in lines if line.per_seed}
    if any(len(line.seeds) == 1 for line in lines):
        notes.append("one seed has no interval and allows no test; several seeds do")
    return Summary(
        metric=metric,
        train_images=train_images,
        steps=tuple(sorted({row["steps"] for row in chosen})),
        targets=targets,
        lines=tuple(lines),
        tests=tuple(compare(values, reference if reference in values else None)),
        notes=tuple(notes),
    )


def summary_tables(rows: Sequence[Row], **options: Any) -> list[Summary]:
    """A `summary_table` for each pair of training images and fine-tuning steps among the rows, all images first."""
    found = {(row.get("train_images"), row["steps"]) for row in rows if row["checkpoint"] in (FINAL, *UNTRAINED)}
    ordered = sorted(found, key=lambda pair: (pair[0] is not None, -(pair[0] or 0), -pair[1]))
    return [summary_table(rows, train_images=size, steps=steps, **options) for size, steps in ordered]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A metric against a quantity for one method, over seeds."""

    label: str
    x: tuple[float, ...]
    y: tuple[Estimate, ...]


def curves(rows: Iterable[Row], x: str, *, metric: str, target: str | None = None) -> list[Curve]:
    """Per method the metric against `x` ("inner_steps" or "images"), at one target or averaged over targets.

    Within a seed the targets are averaged first; a point keeps only seeds that have all targets there. There is no
    point where a fine-tuning failed, since the other seeds alone would flatter the method. For the average against
    "images" the rows' `train_images` is the quantity, since targets differ in how many they have.
    """
    of_target = [row for row in rows if target is None or row["target"] == target]
    chosen = [row for row in of_target if metric in row or "error" in row]
    names = {row["target"] for row in chosen}
    found = []
    for label in _ordered(chosen):
        cells: dict[float, dict[int, dict[str, float]]] = {}
        failed = set()
        for row in chosen:
            if row["label"] == label:
                place = row["train_images"] if x == "images" and target is None else row[x]
                if place is not None and "error" in row:
                    failed.add(float(place))
                elif place is not None:
                    cells.setdefault(float(place), {}).setdefault(row["seed"], {})[row["target"]] = row[metric]
        for place in failed & {*cells}:
            del cells[place]
        points = {}
        for place, seeds in sorted(cells.items()):
            values = [sum(cell.values()) / len(cell) for cell in seeds.values() if set(cell) == names]
            if values:
                points[place] = interval(values)
        if points:
            found.append(Curve(label=label, x=tuple(points), y=tuple(points.values())))
    return found


def pick_metric(rows: Sequence[Row]) -> str:
    """Accuracy where every row that did not fail has it, then mse, then loss."""
    good = [row for row in rows if "error" not in row]
    for metric in _PREFERRED:
        if good and all(metric in row for row in good):
            return metric
    if not good:
        return "accuracy"
    raise UsageError("the targets have no test metric in common; compare them by target with metric=NAME")


def label_runs(recipes: Mapping[Any, Mapping[str, Any]]) -> dict[Any, str]:
    """Run -> label: the method, and what else sets runs of one method apart (seed, targets and output aside).

    `recipes` are flat: dotted field -> value. Three seeds of one recipe are one label; `reptile` at two
    meta-learning rates is `reptile meta_lr=1` and `reptile meta_lr=3`.
    """
    fields = {
        run: {key: value for key, value in recipe.items() if not _within(key, _IGNORED)}
        for run, recipe in recipes.items()
    }
    labels = {}
    for run, mine in fields.items():
        same = [other for other in fields.values() if other["method"] == mine["method"]]
        keys = sorted({key for other in same for key in other})
        apart = {key: mine.get(key) for key in keys if any(other.get(key) != mine.get(key) for other in same)}
        names = [_task_names(other) for other in same]
        if any(other != names[0] for other in names):
            apart = {key: value for key, value in apart.items() if not _within(key, ("tasks",))}
            apart["tasks"] = "+".join(_task_names(mine))
        labels[run] = " ".join([str(mine["method"]), *(f"{key}={_short(value)}" for key, value in apart.items())])
    return labels


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _task_names(recipe: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[1] for key in recipe if key.startswith("tasks.")))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _ordered(rows: Sequence[Row]) -> list[str]:
    """Labels in order of appearance, what was not meta-trained last."""
    labels = dict.fromkeys(row["label"] for row in rows)
    return sorted(labels, key=lambda label: label in UNTRAINED)


def _unlike(rows: Sequence[Row]) -> list[str]:
    """What makes the comparison unfair: different settings or budgets."""
    notes = []
    for target in dict.fromkeys(row["target"] for row in rows):
        found = {row.get("setting") for row in rows if row["target"] == target}
        if len(found) > 1:
            notes.append(
                f"results on {target} come from {len(found)} settings of model, data or fine-tuning: "
                "the comparison is not like with like"
            )
    counted = [row for row in rows if row.get("images") is not None and row.get("train_images") is not None]
    fewer = {row["target"]: row["images"] for row in counted if row["images"] < row["train_images"]}
    if fewer:
        wanted = rows[0]["train_images"]
        shown = ", ".join(f"{target} has {images:,}" for target, images in fewer.items())
        notes.append(f"not all targets have {wanted:,} training images: {shown}")
    budgets = {row["inner_steps"] for row in rows if row["checkpoint"] == FINAL}
    if len(budgets) > 1:
        shown = " and ".join(f"{budget:,}" for budget in sorted(budgets))
        notes.append(f"the methods were meta-trained for unequal budgets of {shown} inner steps per task")
    return notes


def _line(
    label: str, rows: Sequence[Row], targets: Sequence[str], metric: str, confidence: float
) -> tuple[Line, list[str]]:
    """One method's line and the remarks on it."""
    cells: dict[str, dict[int, float]] = {target: {} for target in targets}
    failed: dict[str, list[int]] = {}
    seen: dict[tuple[str, int], Row] = {}
    for row in rows:
        place = (row["target"], row["seed"])
        other = seen.setdefault(place, row)
        if other is not row and other != row:
            raise UsageError(
                f"{label} has two results at seed {row['seed']} on {row['target']} "
                f"(runs {other.get('run', '?')} and {row.get('run', '?')}); compare one of them at a time"
            )
        if "error" in row:
            failed.setdefault(row["target"], []).append(row["seed"])
        elif metric in row:
            cells[row["target"]][row["seed"]] = float(row[metric])
    seeds = tuple(dict.fromkeys(row["seed"] for row in rows))
    complete = () if failed else tuple(s for s in seeds if all(s in cells[target] for target in targets))
    notes = [
        f"{label} failed on {target} at seed {', '.join(map(str, bad))}: no number there and no average"
        for target, bad in failed.items()
    ]
    if not failed and len(complete) < len(seeds):
        missing = ", ".join(str(seed) for seed in seeds if seed not in complete)
        notes.append(f"{label} lacks targets at seed {missing}: left out of its average and of the tests")
    per_seed = {seed: sum(cells[target][seed] for target in targets) / len(targets) for seed in complete}
    return Line(
        label=label,
        method=rows[0]["method"],
        inner_steps=max(row["inner_steps"] for row in rows),
        seeds=complete,
        targets={
            target: interval(list(cell.values()), confidence)
            for target, cell in cells.items()
            if cell and target not in failed
        },
        average=interval(list(per_seed.values()), confidence) if per_seed else None,
        per_seed=per_seed,
    ), notes
