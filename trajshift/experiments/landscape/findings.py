"""Which of the paper's claims hold in this run: verdicts computed from the numbers, and the numbers beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trajshift.evaluation.statistics import Estimate, PairedTest, compare, interval, show
from trajshift.experiments.landscape.measure import METHODS, End
from trajshift.experiments.landscape.summary import (
    ACCURATE,
    OURS,
    REPTILE,
    Comparison,
    compared,
    lower,
    show_corrected_p,
)
from trajshift.utils.table import Table

if TYPE_CHECKING:
    from trajshift.experiments.landscape.results import Results

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
BIAS_AT = (5, 10, 25, 50)
SAME_WAY, AGREEMENT = 0.95, 0.1
"""The cosine above which directions count as the same; the largest gap, in distances travelled, that is agreement."""
_HEADER = ("method", "meta-updates", "inner steps", "mean quality", "median", "good ends", "left", "overflowed")
_COLUMNS = (("mean", 3), ("median", 3), ("good", 1))


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, its verdict and the evidence in a sentence or two."""

    text: str
    verdict: str
    evidence: str


@dataclass(kw_only=True, slots=True)
class Findings:
    """Claims and tables in reading order, and the numbers behind them as JSON values."""

    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    setting: str = ""
    """What was run and how to read the numbers."""
    quality: dict[str, Comparison] = field(default_factory=dict)
    """Unit of the budget -> all methods on the random sets."""

    def markdown(self) -> str:
        """The whole file."""
        claims = "".join(f"- **{one.verdict}**: {one.text} {one.evidence}\n" for one in self.claims)
        tables = "\n".join(table.markdown() for table in self.tables)
        return f"# What holds in this run\n\n{self.setting}\n\n{claims}\n{tables}"


def findings(results: Results) -> Findings:
    """All claims of section 4.1, judged."""
    settings = results.settings
    found = Findings(
        setting=f"{settings.sets} random sets of eight tasks x {settings.starts_side**2} starts, the same meta_lr "
        f"{settings.meta_lr:g} for all methods, K = {settings.horizon}, inner SGD with learning rate "
        f"{settings.inner_lr:g} and momentum {settings.momentum:g}. Quality is the mean loss of the tasks after "
        f"{settings.horizon} Adam steps (lr {settings.test_lr:g}) from phi; lower is better, and no start counts "
        "as worse than the worst point of the domain. A set of tasks is the "
        "unit: numbers are means over sets with 95% t-intervals, tests are paired over sets and corrected by Holm "
        "within their family; a claim holds, or fails, where p < 0.05."
    )
    quality = found.quality = {
        unit: compared({m: np.asarray(end.quality) for m, end in ends.items()}, np.asarray(results.yardsticks))
        for unit, ends in results.ends.items()
    }
    _short_horizon(results, found)
    _number_of_optima(results, found)
    _against_reptile(results, quality, found)
    published = _on_the_published_set(results, found)
    _early_agreement(results, found)
    _is_accuracy_needed(quality["meta-updates"], found)
    _others(quality["meta-updates"], found)
    for unit, comparison in quality.items():
        found.tables.append(_quality_table(unit, comparison, results.ends[unit], settings.updates))
        found.numbers[f"quality at equal {unit}"] = {
            measure: getattr(comparison, measure) for measure in ("mean", "median", "good")
        }
    found.tables.append(published)
    return found


def _judge(found: bool | None) -> str:
    return OPEN if found is None else HOLDS if found else FAILS


def _short_horizon(results: Results, found: Findings) -> None:
    longest = results.settings.horizon
    lengths = [k for k in BIAS_AT if k < longest]
    values = {f"k = {k}": dict(enumerate(results.bias[:, k].tolist())) for k in (longest, *lengths)}
    tests = compare(values, f"k = {longest}")
    verdicts = [lower(test) for test in tests]
    verdict = HOLDS if all(v is True for v in verdicts) else FAILS if any(v is False for v in verdicts) else OPEN
    published, largest = results.bias_published, max(tests, key=lambda test: test.p_holm or 0.0)
    evidence = (
        f"Quality after {longest} steps of the grid's best phi for k steps, over {len(results.bias)} random sets: "
        + ", ".join(f"{show(interval(list(values[f'k = {k}'].values())))} at k = {k}" for k in (*lengths, longest))
        + f" (largest p against k = {longest}: {show_corrected_p(largest)}). Published set: "
        + ", ".join(f"{published[k]:.3f} at k = {k}" for k in (*lengths, longest))
        + "."
    )
    found.claims.append(Claim("Short-horizon bias: phi chosen for few steps is worse after many.", verdict, evidence))
    found.numbers["short-horizon bias"] = {name: list(of.values()) for name, of in values.items()}


def _number_of_optima(results: Results, found: Findings) -> None:
    settings = results.settings
    short, long = results.optima
    counts = {f"k = {k}": dict(enumerate(map(float, counted))) for k, counted in results.clusters.items()}
    (test,) = compare(counts)
    published = "; ".join(
        f"{len(one.points)} points in {one.cluster_count} clusters at k = {k}" for k, one in results.optima.items()
    )
    evidence = (
        f"Published set, from a {settings.side} x {settings.side} grid: {published}. "
        f"Random sets, each from a {settings.optima_side} x {settings.optima_side} grid: "
        + " against ".join(f"{show(interval(list(of.values())), 1)} clusters at {name}" for name, of in counts.items())
        + f" (difference {show(test.difference, 1, signed=True)}, p {show_corrected_p(test)})."
    )
    found.claims.append(
        Claim(f"There are fewer meta-level optima at k = {short} than at k = {long}.", _judge(lower(test)), evidence)
    )
    found.numbers["optima"] = {
        f"k = {k}": {"points": len(one.points), "clusters": one.cluster_count, "fates": one.fates,
                     "clusters of random sets": results.clusters[k]}
        for k, one in results.optima.items()
    }  # fmt: skip


def _against_reptile(results: Results, quality: dict[str, Comparison], found: Findings) -> None:
    for unit, comparison in quality.items():
        tests, good = comparison.tests("mean"), comparison.tests("good")
        for method in (OURS, ACCURATE):
            pair = (method, REPTILE)
            text = f"At {results.settings.updates} {unit}, {method} reaches better phi than {REPTILE}."
            evidence = f"{_difference(tests[pair])}; {_points(good[pair])}."
            found.claims.append(Claim(text, _judge(lower(tests[pair])), evidence))


def _on_the_published_set(results: Results, found: Findings) -> Table:
    quality = {method: np.asarray(end.quality) for method, end in results.published.items()}
    comparison = compared(quality, np.asarray(results.published_yardstick))
    ends_well = {
        m: np.nan_to_num(q[0], nan=np.inf) <= float(results.published_yardstick[0]) for m, q in quality.items()
    }
    evidence, held = "", []
    for method in (OURS, ACCURATE):
        better, worse = ends_well[method] & ~ends_well[REPTILE], ends_well[REPTILE] & ~ends_well[method]
        held.append(better.sum() > worse.sum())
        evidence += (
            f"From {better.mean():.1%} of the starts {method} ends in the best tenth of the domain and {REPTILE} does "
            f"not, from {worse.mean():.1%} the other way round. "
        )
    means = ", ".join(f"{method} {of[0]:.3f}" for method, of in comparison.mean.items())
    evidence += f"Mean final quality: {means}. One set of tasks allows no interval."
    verdict = HOLDS if all(held) else FAILS if not any(held) else f"{HOLDS} for one of the two"
    text = f"On the published set, {OURS} and {ACCURATE} avoid bad optima where {REPTILE} gets stuck."
    found.claims.append(Claim(text, verdict, evidence))
    found.numbers["published set"] = {m: getattr(comparison, m) for m in ("mean", "median", "good")}
    return _published_table(results, comparison)


def _early_agreement(results: Results, found: Findings) -> None:
    marks = results.settings.marks()
    ours, exact = (results.ends["meta-updates"][m].marked for m in (OURS, ACCURATE))
    finite = ours.isfinite().all(-1).all(0) & exact.isfinite().all(-1).all(0)
    gaps: dict[int, list[float]] = {}
    cosines: dict[int, list[float]] = {}
    for place, mark in enumerate(marks[1:], start=1):
        apart = torch.linalg.vector_norm(ours[place] - exact[place], dim=-1)
        travelled = torch.linalg.vector_norm(exact[place] - exact[0], dim=-1)
        cosine = torch.cosine_similarity(ours[place] - ours[0], exact[place] - exact[0], dim=-1)
        gaps[mark] = [float(a[f].mean() / t[f].mean()) for a, t, f in zip(apart, travelled, finite, strict=True)]
        cosines[mark] = [float(c[f].mean()) for c, f in zip(cosine, finite, strict=True)]
    first, last = marks[min(2, len(marks) - 2)], marks[-1]
    (growth,) = compare({name: dict(enumerate(gaps[at])) for name, at in (("early", first), ("late", last))})
    found.claims += [
        Claim(
            f"At meta-update {first}, {OURS} and {ACCURATE} have gone the same way (cosine above {SAME_WAY:g}).",
            _beyond(interval(cosines[first]), SAME_WAY, above=True),
            f"Mean cosine between the two ways made, by meta-update: {_by_mark(cosines)}.",
        ),
        Claim(
            f"They have also gone as far: the two phi are within {AGREEMENT:.0%} of the distance travelled.",
            _beyond(interval(gaps[first]), AGREEMENT, above=False),
            f"Mean distance between the two phi over the distance travelled, by meta-update: {_by_mark(gaps)}.",
        ),
        Claim(
            f"They are closer to each other early (meta-update {first}) than late ({last}).",
            _judge(lower(growth)),
            f"Early - late: {show(growth.difference, signed=True)} (p {show_corrected_p(growth)}).",
        ),
    ]
    found.numbers["cosine between trajectory-shifting and accurate"] = cosines
    found.numbers["gap between trajectory-shifting and accurate"] = gaps


def _beyond(estimate: Estimate, level: float, *, above: bool) -> str:
    """Whether an interval is on the claimed side of a level."""
    if estimate.low is None or estimate.high is None:
        return OPEN
    if estimate.low > level:
        return HOLDS if above else FAILS
    if estimate.high < level:
        return FAILS if above else HOLDS
    return OPEN


def _by_mark(values: dict[int, list[float]]) -> str:
    return ", ".join(f"{mark}: {show(interval(of), 2)}" for mark, of in values.items())


def _difference(test: PairedTest) -> str:
    """A pair in mean final quality."""
    difference = show(test.difference, signed=True)
    return f"{test.first} - {test.second} in mean final quality: {difference} (p {show_corrected_p(test)})"


def _points(test: PairedTest) -> str:
    """The same pair in the share of good ends."""
    difference = show(test.difference, 1, signed=True)
    p = show_corrected_p(test)
    return f"in the share of starts that end in the best tenth of the domain: {difference} points (p {p})"


def _is_accuracy_needed(comparison: Comparison, found: Findings) -> None:
    pair = (ACCURATE, OURS)
    test, good = comparison.tests("mean")[pair], comparison.tests("good")[pair]
    evidence = (
        f"{_difference(test)}; {_points(good)}. No difference shown is no proof of none: the interval says how large "
        "it may be."
    )
    text = "The shift's approximation error leads to worse phi (the paper: not necessarily)."
    found.claims.append(Claim(text, _judge(lower(test)), evidence))


def _others(comparison: Comparison, found: Findings) -> None:
    tests, good = comparison.tests("mean"), comparison.tests("good")
    for method, source in (
        ("no-shifting", "figure 8 of the paper claims it for images"),
        ("random-shifting", "figure 8 of the paper claims it for images"),
        ("leap", "section 4.2 of the paper claims it for images"),
        ("fomaml", "section 4.2 of the paper claims it for images"),
    ):
        pair = (OURS, method)
        evidence = f"{_difference(tests[pair])}; {_points(good[pair])}."
        if (method, REPTILE) in tests:
            evidence += f" {_difference(tests[method, REPTILE])}."
        text = f"{OURS} reaches better phi than {method} ({source})."
        found.claims.append(Claim(text, _judge(lower(tests[pair])), evidence))


def _quality_table(unit: str, comparison: Comparison, ends: dict[str, End], amount: int) -> Table:
    columns = {measure: comparison.estimates(measure) for measure in ("mean", "good")}
    rows = []
    for method in METHODS:
        end = ends[method]
        median = float(np.mean(list(comparison.median[method].values())))
        rows.append([
            method, str(end.updates), f"{end.inner_steps:,}", show(columns["mean"][method]), f"{median:.3f}",
            show(columns["good"][method], 1), str(int(end.left.sum())), str(int(end.overflowed.sum())),
        ])  # fmt: skip
    caption = (
        f"At most {amount} {unit}. Median: over starts, averaged over sets. Good ends: % of starts in the best tenth "
        f"of the domain. Left, overflowed: starts of {comparison.starts} whose phi was outside the domain at some "
        f"meta-update, or not finite; in the mean an overflow counts as the worst point of the domain, in median and "
        "good ends as bad."
    )
    return Table(_HEADER, rows, caption)


def _published_table(results: Results, comparison: Comparison) -> Table:
    rows = [
        [
            method, str(end.updates), f"{end.inner_steps:,}",
            *(f"{getattr(comparison, measure)[method][0]:.{digits}f}" for measure, digits in _COLUMNS),
            str(int(end.left.sum())), str(int(end.overflowed.sum())),
        ]
        for method, end in results.published.items()
    ]  # fmt: skip
    caption = (
        f"The published set, from the {results.settings.side} x {results.settings.side} grid; "
        "an overflow counts as the worst point of the domain. One set of tasks: no interval."
    )
    return Table(_HEADER, rows, caption)
