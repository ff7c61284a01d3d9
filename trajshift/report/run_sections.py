"""The page's sections on the runs themselves: cost, recipes, environment, how the numbers are made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trajshift.recipes.recipe import to_yaml
from trajshift.report.page import Page
from trajshift.report.saved_runs import Run, by_label
from trajshift.utils.progress import duration
from trajshift.utils.table import Table


def cost_section(page: Page, runs: Sequence[Run]) -> None:
    """Runs, budgets and wall time of each method."""
    page.heading("What it cost")
    rows = []
    for label, group in by_label(runs).items():
        seconds = [run.seconds for run in group if run.seconds is not None]
        rows.append(
            [
                label,
                str(len(group)),
                *(_range([run.choices.get(name) for run in group]) for name in ("meta_lr", "meta_every")),
                *(_range([run.last.get(name) for run in group]) for name in ("inner_steps", "gradient_evaluations")),
                duration(sum(seconds) / len(seconds)) if seconds else "-",
            ]
        )
    header = ["method", "runs", "meta lr", "meta every", "inner steps", "gradient evaluations", "wall time per run"]
    caption = (
        "Inner steps are cumulative per task, replays included; gradient evaluations are summed over all tasks "
        "(held-out passes count 1, Hessian-vector products 2). Wall time is the mean of meta-training, without "
        "fine-tuning."
    )
    page.table(Table(header, rows, caption))


def recipes_section(page: Page, runs: Sequence[Run]) -> None:
    """The recipe of the first run of each method."""
    page.heading("Recipes")
    page.paragraph("A recipe is complete: trajshift train on the file repeats the run. The first run of each method:")
    for label, group in by_label(runs).items():
        first, others = group[0], [f"{run.path.name} (seed {run.recipe.seed})" for run in group[1:]]
        also = f"; likewise {', '.join(others)}" if others else ""
        page.code(to_yaml(first.recipe), f"{label}: {first.path.name}/recipe.yaml (seed {first.recipe.seed}){also}")


def environment_section(page: Page, runs: Sequence[Run]) -> None:
    """What the runs were made on."""
    page.heading("Environment")
    texts: dict[str, list[str]] = {}
    for run in runs:
        if run.environment:
            shown = {key: value for key, value in run.environment.items() if key != "earlier_starts"}
            shown["starts"] = 1 + len(run.environment.get("earlier_starts", []))
            texts.setdefault(json.dumps(shown), []).append(run.path.name)
    if not texts:
        page.paragraph("No environment.json was saved with these runs.")
    for text, names in texts.items():
        rows = [[key.replace("_", " "), _flat(value)] for key, value in json.loads(text).items() if value is not None]
        which = names[0] if len(names) == 1 else "all runs" if len(names) == len(runs) else ", ".join(names)
        page.table(Table(["", which], rows), text=(1,))


def explanation_section(page: Page) -> None:
    """What a seed, an interval and a test are."""
    page.heading("How the numbers are made")
    page.paragraph(
        "A seed is a whole pipeline: start of phi, heads, batches, meta-training, target subset and fine-tuning. "
        "Intervals are two-sided 95% Student t-intervals over seeds; the average takes the mean over targets within "
        "each seed first. Tests are two-sided paired t-tests over the seeds that both methods have, corrected by "
        "Holm's step-down procedure within one table. With one seed there is neither interval nor test. With few "
        "seeds a t-interval relies on normally distributed values, which cannot be checked."
    )


def _range(values: Sequence[Any]) -> str:
    """One number where all runs agree, else the smallest and the largest."""
    known = [value for value in values if isinstance(value, (int, float))]
    if not known:
        return "-"
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
