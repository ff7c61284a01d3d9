"""Figures, findings.md, results.json and the page of the approximation error, all from the saved units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trajshift.evaluation.statistics import LEVEL, Estimate, show
from trajshift.experiments.approximation.figures import error_figure, order_figure, shift_figure
from trajshift.experiments.approximation.measurement_plan import (
    DISPLACEMENT,
    PRESCRIBED,
    MeasurementPlan,
    Setting,
    scale,
)
from trajshift.experiments.approximation.summary import (
    FIRST_K,
    SLOPE_K,
    SMALL,
    Comparison,
    Measured,
    Slope,
    Units,
    comparisons,
    estimate,
    measured,
    slopes,
)
from trajshift.recipes.recipe import Recipe
from trajshift.report.figures import save
from trajshift.report.page import Page
from trajshift.utils.environment import environment
from trajshift.utils.files import replace_file, write_json
from trajshift.utils.table import Table

if TYPE_CHECKING:
    from trajshift.experiments.approximation.quadratic import Check


def write_results(out: Path, units: Units, plan: MeasurementPlan, recipe: Recipe, networks: Sequence[str]) -> Path:
    """Writes everything into `out`; returns the page."""
    from trajshift.experiments.approximation.quadratic import closed_form_check

    checks = [closed_form_check(momentum=momentum) for momentum in (0.0, 0.9)]
    fitted, compared = slopes(units, plan, networks), comparisons(units, plan, networks)
    table = [measured(units, setting, plan) for setting in plan.settings(networks)]
    figures = {
        "error": save(error_figure(units, plan, networks, relative=False), "error", out),
        "relative": save(error_figure(units, plan, networks, relative=True), "relative", out),
        "orders": save(order_figure(units, plan, networks, checks), "orders", out),
        "shifts": save(shift_figure(compared, networks), "shifts", out),
    }
    about = _about(units, plan, recipe, networks)
    findings = _findings(table, fitted, compared, checks, plan)
    tables = {"slopes": _slope_table(fitted), "shifts": _shift_table(compared, plan)}
    replace_file(out / "findings.md", _markdown(about, findings, tables))
    results = {
        "environment": environment(),
        "measured_at": sorted({str(unit["commit"]) for unit in units.values()}),
        "plan": asdict(plan),
        "errors": [_row(one) for one in table],
        "slopes": [asdict(one) for one in fitted],
        "shifts": [asdict(one) for one in compared],
        "quadratics": {f"momentum {one.momentum:g}": one.deviation for one in checks},
    }
    write_json(out / "results.json", results)
    page = out / "index.html"
    replace_file(page, _page(about, findings, tables, figures).html())
    return page


def _row(one: Measured) -> dict[str, object]:
    """A setting with mean and half width of error and relative error at each k."""
    found = {name: [estimate(column) for column in getattr(one, name).T] for name in ("error", "relative")}
    numbers = {name: [None if e is None else [e.mean, e.half_width] for e in each] for name, each in found.items()}
    return {**asdict(one.setting), "curvature": one.curvature, **numbers}


def _about(units: Units, plan: MeasurementPlan, recipe: Recipe, networks: Sequence[str]) -> str:
    """What was run, in a sentence or two."""
    tasks = ", ".join(recipe.source_tasks())
    options = f" {recipe.model.options}" if recipe.model.options else ""
    count = next(iter(units.values()))["parameters"]
    return (
        f"Model {recipe.model.name}{options} with {count:,} shared parameters ({'; '.join(networks)}), tasks "
        f"{tasks}, batches of {recipe.batch_size}, float64, the start of training; {plan.draws} draws (start, heads "
        "and batches), tasks averaged within a draw; intervals are 95% t-intervals over draws. Both sides see the "
        "same batches. Momentum is 0.9; Adam's learning rates are a tenth of those of SGD; no weight decay."
    )


# -- findings ------------------------------------------------------------------------------------------------


def _findings(
    table: Sequence[Measured],
    fitted: Sequence[Slope],
    compared: Sequence[Comparison],
    checks: Sequence[Check],
    plan: MeasurementPlan,
) -> list[str]:
    """One sentence per finding, every number from this run."""
    said = [_size(table, plan)]
    networks = list(dict.fromkeys(one.setting.network for one in table))
    if len(networks) == 2:
        said.append(_kinks(table, networks, plan))
    said += _orders(fitted)
    worst = max(one.deviation for one in checks)
    said.append(
        "On quadratic losses, where the error is known in closed form, the measured error agrees with it to a "
        f"relative {worst:.1e} at {len(checks[0].ks)} k from 2 to {checks[0].horizon}, with and without momentum."
    )
    said += _better(compared, plan)
    overflowed = sum(int(np.any(~np.isfinite(one.error), axis=1).sum()) for one in table)
    of = sum(len(one.error) for one in table)
    said.append(f"{overflowed} of {of} trajectories overflowed" + ("; they are left out." if overflowed else "."))
    return said


def _middle(table: Sequence[Measured], plan: MeasurementPlan, optimizer: str, network: str) -> Measured:
    point = Setting(
        network=network, optimizer=optimizer, shifts=DISPLACEMENT, alpha=plan.alpha * scale(optimizer), beta=plan.beta
    )
    return next(one for one in table if one.setting == point)


def _size(table: Sequence[Measured], plan: MeasurementPlan) -> str:
    networks = dict.fromkeys(one.setting.network for one in table)
    optimizers = dict.fromkeys(one.setting.optimizer for one in table)
    parts = [
        f"{_percent(estimate(_middle(table, plan, optimizer, network).relative[:, -1]))} ({network}, {optimizer})"
        for network in networks
        for optimizer in optimizers
    ]
    return (
        f"After k = {plan.ks[-1]} steps at alpha {plan.alpha:g} (Adam: {plan.alpha * scale('Adam'):g}) and beta "
        f"{plan.beta:g} the error is, relative to ||theta_k - phi||: {'; '.join(parts)}."
    )


def _kinks(table: Sequence[Measured], networks: Sequence[str], plan: MeasurementPlan) -> str:
    """Whether kinks add error, by what the interval of each optimizer says."""
    kinked, smooth = networks
    found: dict[str, list[str]] = {}
    for optimizer in dict.fromkeys(one.setting.optimizer for one in table):
        logs = [np.log(_middle(table, plan, optimizer, network).error[:, -1]) for network in (kinked, smooth)]
        ratio = estimate(logs[0] - logs[1])
        found.setdefault(_verdict(ratio), []).append(f"{optimizer} {_times(ratio)}")
    parts = "; ".join(f"{verdict} under {', '.join(places)}" for verdict, places in found.items())
    return f"Error with {kinked} over that with {smooth} at k = {plan.ks[-1]}: {parts}."


def _verdict(ratio: Estimate | None) -> str:
    if ratio is None or ratio.low is None or ratio.high is None:
        return "undecided (no interval)"
    if ratio.low > 0.0:
        return "kinks add error, as the paper says,"
    return "kinks lower the error, against the paper," if ratio.high < 0.0 else "undecided"


def _orders(fitted: Sequence[Slope]) -> list[str]:
    said = []
    for network in dict.fromkeys(slope.network for slope in fitted):
        parts = []
        for shifts in (PRESCRIBED, DISPLACEMENT):
            mine = [s for s in fitted if s.predicted and (s.network, s.shifts) == (network, shifts)]
            each = ", ".join(f"{_power(s)} (predicted {s.predicted})" for s in mine)
            parts.append(f"{shifts} shifts {each}")
        said.append(f"Orders for plain SGD with {network}: {'; '.join(parts)}.")
    return said


def _power(slope: Slope) -> str:
    if slope.measured is None:
        return f"{slope.variable}: fewer than two points in the regime"
    return f"{slope.variable}^{show(slope.measured, 2)}"


def _better(compared: Sequence[Comparison], plan: MeasurementPlan) -> list[str]:
    return [
        f"Against the identity shift, along the same shifts of phi (momentum, beta {plan.shift_beta:g}), {network}: "
        f"lower error (p < 0.05 after Holm's correction) for {_shown(compared, network, lower=True)}; higher for "
        f"{_shown(compared, network, lower=False)}."
        for network in dict.fromkeys(one.network for one in compared)
    ]


def _shown(compared: Sequence[Comparison], network: str, *, lower: bool) -> str:
    """Carries and k with a significant difference, and the factor."""
    found: dict[str, list[str]] = {}
    shown = [one for one in compared if one.network == network and one.p is not None and one.p < LEVEL]
    for one in shown:
        if one.ratio is not None and (one.ratio.mean < 0.0) == lower:
            found.setdefault(one.carry, []).append(f"{one.k} (x {np.exp(one.ratio.mean):.2f})")
    return "; ".join(f"{carry} at k = {', '.join(places)}" for carry, places in found.items()) or "none"


# -- tables and text -----------------------------------------------------------------------------------------


def _percent(one: Estimate | None) -> str:
    if one is None:
        return "-"
    return f"{100 * one.mean:.3g}%" + ("" if one.half_width is None else f" ± {100 * one.half_width:.2g}")


def _times(log_ratio: Estimate | None) -> str:
    """A mean logarithm with its interval, as a factor."""
    if log_ratio is None:
        return "-"
    ends = "" if log_ratio.low is None or log_ratio.high is None else (
        f" ({np.exp(log_ratio.low):.2f}-{np.exp(log_ratio.high):.2f})"
    )  # fmt: skip
    return f"{np.exp(log_ratio.mean):.2f}{ends}"


def _slope_table(fitted: Sequence[Slope]) -> Table:
    variables = list(dict.fromkeys(slope.variable for slope in fitted))
    rows: dict[tuple[str, ...], list[str]] = {}
    for slope in fitted:
        line = (slope.network, slope.optimizer, slope.shifts)
        cell = show(slope.measured, 2) + (f" [{slope.predicted}]" if slope.predicted else "")
        rows.setdefault(line, list(line)).append(cell)
    return Table(["network", "inner optimizer", "shifts", *variables], list(rows.values()), _SLOPES)


def _shift_table(compared: Sequence[Comparison], plan: MeasurementPlan) -> Table:
    ks = list(dict.fromkeys(one.k for one in compared))
    rows: dict[tuple[str, str], list[str]] = {}
    for one in compared:
        cell = _times(one.ratio) + ("*" if one.p is not None and one.p < LEVEL else "")
        rows.setdefault((one.network, one.carry), [one.network, one.carry]).append(cell)
    return Table(["network", "carry", *(f"k = {k}" for k in ks)], list(rows.values()), _SHIFTS.format(plan=plan))


_SLOPES = (
    "Exponents fitted in log-log, draw by draw, mean and 95% interval; in brackets what equation 5 predicts for "
    f"plain SGD. In k: at the smallest alpha, from k = {FIRST_K} on, where alpha h k is at most {SMALL:g}, with h "
    f"the Hessian's norm at the start; and at the middle alpha over all k from {FIRST_K} on, where no order is "
    f"predicted. In alpha and beta: at k = {SLOPE_K}, in alpha where alpha h k is at most {SMALL:g}."
)
_SHIFTS = (
    "Error over that of the identity shift along the same shifts of phi, those of Algorithm 2 with beta "
    "{plan.shift_beta:g} (SGD with momentum, alpha {plan.alpha:g}): geometric mean over draws with its 95% interval; "
    "* marks p < 0.05 of the paired test after Holm's correction over the table."
)
_ESTIMATES = (
    "hold leaves theta where it is. scalar takes dU_k/dphi as a multiple of the identity, from the curvature along "
    "the shift (a Hessian-vector product every 10 steps). diagonal takes it as a diagonal, from squared gradients, "
    "at no extra pass. tangent corrects the shift to first order in alpha, velocity adds what dv_k/dphi = c_k H, "
    "c_k = (1 - mu^k) / (1 - mu), says to the momentum buffers; both take two Hessian-vector products every 10 "
    "steps."
)


def _markdown(about: str, findings: Sequence[str], tables: dict[str, Table]) -> str:
    points = "\n".join(f"- {finding}" for finding in findings)
    return (
        f"# Approximation error of the shift\n\n{about}\n\n{points}\n\n## Orders\n\n{tables['slopes'].markdown()}\n"
        f"## Better shifts\n\n{_ESTIMATES}\n\n{tables['shifts'].markdown()}"
    )


def _page(about: str, findings: Sequence[str], tables: dict[str, Table], figures: dict[str, str]) -> Page:
    page = Page("How far is a shifted trajectory from the one it approximates?")
    page.paragraph(
        "Trajectory shifting never restarts a task: when the initialization phi moves by d, every running "
        "trajectory is moved by the same d, as if the inner run were a translation of its start (equation 3). The "
        "price is the approximation error of equation 5: error(k) = ||U_k(phi + d_1 + ... + d_(k-1)) - theta_k||, "
        "the distance between the shifted trajectory and the one that k inner steps from the moved start would "
        "give.",
        "lead",
    )
    page.paragraph(about, "quiet")
    page.heading("Figure 3 of the paper")
    page.figure(
        figures["error"],
        "Error against inner learning rate, meta-learning rate and trajectory length; mean and 95% interval over "
        "draws (an interval that reaches zero is cut at a tenth of the mean).",
    )
    page.paragraph(
        "A ReLU or a maximum that switches between the two trajectories makes their gradients differ at once, while "
        "the gradients of a smooth network diverge slowly. How much that adds is among the findings below."
    )
    page.figure(
        figures["relative"], "The same relative to ||theta_k - phi||, the distance that the meta-gradient measures."
    )
    page.heading("The orders of equation 5")
    page.paragraph(
        "Each shift d_i acts on theta for only k - i of its k steps; the i steps before it are missing. Each "
        "missing step would have contracted d_i by I - alpha H. So the error is about alpha h sum_i i |d_i|: k^2 "
        "for shifts of one length, and k^3 for displacements, which themselves grow like alpha i."
    )
    page.figure(
        figures["orders"], "Plain SGD against the predicted powers of k, and quadratics against their closed form."
    )
    page.table(tables["slopes"], text=(1, 2))
    page.heading("Is there a better shift than the identity?")
    page.paragraph(_ESTIMATES)
    page.figure(
        figures["shifts"], "Error of each estimate over that of the identity shift, along the same shifts of phi."
    )
    page.table(tables["shifts"], text=(1,))
    page.heading("Findings of this run")
    for finding in findings:
        page.paragraph(finding)
    return page
