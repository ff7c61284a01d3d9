"""From evaluation rows to tables and curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajshift.errors import UsageError
from trajshift.evaluation.evaluation_row import FINAL, UNTRAINED_LABELS, EvaluationRow
from trajshift.evaluation.statistics import Estimate, PairedTest, compare, interval, show, show_p

AVERAGE = "average of targets"
"""Listed beside the targets' names."""
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
        """The paired tests as text; a pair without a test gives the reason in place of t."""
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


def summary_table(
    rows: Iterable[EvaluationRow],
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
        if row.start.is_end and row.train_images == train_images and (steps is None or row.steps == steps)
    ]
    if not chosen:
        images = "all training images" if train_images is None else f"train_images={train_images}"
        raise UsageError(f"there are no evaluation rows with {images}; run trajshift evaluate first")
    metric = metric or pick_metric(chosen)
    targets = tuple(dict.fromkeys(row.target for row in chosen))
    notes = _unlike(chosen)
    lines = []
    for label in _ordered(chosen):
        line, remarks = _line(label, [row for row in chosen if row.label == label], targets, metric, confidence)
        lines.append(line)
        notes += remarks
    values = {line.label: line.per_seed for line in lines if line.per_seed}
    if any(len(line.seeds) == 1 for line in lines):
        notes.append("one seed gives neither an interval nor a test; use several seeds")
    return Summary(
        metric=metric,
        train_images=train_images,
        steps=tuple(sorted({row.steps for row in chosen})),
        targets=targets,
        lines=tuple(lines),
        tests=tuple(compare(values, reference if reference in values else None)),
        notes=tuple(notes),
    )


def summary_tables(rows: Sequence[EvaluationRow], **options: Any) -> list[Summary]:
    """A `summary_table` for each pair of training images and fine-tuning steps among the rows, all images first."""
    found = {(row.train_images, row.steps) for row in rows if row.start.is_end}
    ordered = sorted(found, key=lambda pair: (pair[0] is not None, -(pair[0] or 0), -pair[1]))
    return [summary_table(rows, train_images=size, steps=steps, **options) for size, steps in ordered]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A metric against a quantity for one method, over seeds."""

    label: str
    x: tuple[float, ...]
    y: tuple[Estimate, ...]


def curves(
    points: Iterable[tuple[float | None, EvaluationRow]], *, metric: str, target: str | None = None
) -> list[Curve]:
    """Per method the metric against a quantity, at one target or averaged over targets.

    `points` are pairs of the quantity and the row, such as `[(row.inner_steps, row) for row in rows]`; a row without
    the quantity is left out. Within a seed the targets are averaged first; a point keeps only seeds that have all
    targets there. There is no point where a fine-tuning failed, since the other seeds alone would flatter the method.
    """
    of_target = [(place, row) for place, row in points if target is None or row.target == target]
    chosen = [(place, row) for place, row in of_target if metric in row.metrics or row.error is not None]
    names = {row.target for _, row in chosen}
    found = []
    for label in _ordered([row for _, row in chosen]):
        cells: dict[float, dict[int, dict[str, float]]] = {}
        failed = set()
        for place, row in chosen:
            if row.label != label or place is None:
                continue
            if row.error is not None:
                failed.add(float(place))
            else:
                cells.setdefault(float(place), {}).setdefault(row.seed, {})[row.target] = row.metrics[metric]
        means = {}
        for place in sorted({*cells} - failed):
            values = [sum(cell.values()) / len(cell) for cell in cells[place].values() if set(cell) == names]
            if values:
                means[place] = interval(values)
        if means:
            found.append(Curve(label=label, x=tuple(means), y=tuple(means.values())))
    return found


def pick_metric(rows: Sequence[EvaluationRow]) -> str:
    """Accuracy where every row that did not fail has it, then mse, then loss."""
    good = [row for row in rows if row.error is None]
    for metric in _PREFERRED:
        if good and all(metric in row.metrics for row in good):
            return metric
    if not good:
        return "accuracy"
    raise UsageError("the targets have no test metric in common; compare them by target with metric=NAME")


def _ordered(rows: Sequence[EvaluationRow]) -> list[str]:
    """Labels in order of appearance, what was not meta-trained last."""
    labels = dict.fromkeys(row.label for row in rows)
    return sorted(labels, key=lambda label: label in UNTRAINED_LABELS)


def _unlike(rows: Sequence[EvaluationRow]) -> list[str]:
    """What makes the comparison unfair: different settings or budgets."""
    notes = []
    for target in dict.fromkeys(row.target for row in rows):
        found = {row.setting for row in rows if row.target == target}
        if len(found) > 1:
            notes.append(
                f"results on {target} come from {len(found)} settings of model, data or fine-tuning: "
                "the comparison is not like for like"
            )
    wanted = rows[0].train_images
    fewer = {row.target: row.images for row in rows if wanted and row.images is not None and row.images < wanted}
    if fewer:
        shown = ", ".join(f"{target} has {images:,}" for target, images in fewer.items())
        notes.append(f"not all targets have {wanted:,} training images: {shown}")
    budgets = {row.inner_steps for row in rows if row.start == FINAL}
    if len(budgets) > 1:
        shown = " and ".join(f"{budget:,}" for budget in sorted(budgets))
        notes.append(f"the methods were meta-trained for unequal budgets of {shown} inner steps per task")
    return notes


def _line(
    label: str, rows: Sequence[EvaluationRow], targets: Sequence[str], metric: str, confidence: float
) -> tuple[Line, list[str]]:
    """One method's line and the remarks on it."""
    cells: dict[str, dict[int, float]] = {target: {} for target in targets}
    failed: dict[str, list[int]] = {}
    seen: dict[tuple[str, int], EvaluationRow] = {}
    for row in rows:
        other = seen.setdefault((row.target, row.seed), row)
        if other != row:
            raise UsageError(
                f"{label} has two results at seed {row.seed} on {row.target} "
                f"(runs {other.run or '?'} and {row.run or '?'}); compare one of them at a time"
            )
        if row.error is not None:
            failed.setdefault(row.target, []).append(row.seed)
        elif metric in row.metrics:
            cells[row.target][row.seed] = row.metrics[metric]
    seeds = tuple(dict.fromkeys(row.seed for row in rows))
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
        method=rows[0].method,
        inner_steps=max(row.inner_steps for row in rows),
        seeds=complete,
        targets={
            target: interval(list(cell.values()), confidence)
            for target, cell in cells.items()
            if cell and target not in failed
        },
        average=interval(list(per_seed.values()), confidence) if per_seed else None,
        per_seed=per_seed,
    ), notes
