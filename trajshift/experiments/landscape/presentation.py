"""The page: every figure with a paragraph that explains it, the findings, and the playground."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trajshift.experiments.landscape import drawing
from trajshift.experiments.landscape.findings import Findings
from trajshift.report.figures import save
from trajshift.report.page import Page
from trajshift.utils.table import Table

if TYPE_CHECKING:
    from trajshift.experiments.landscape.results import Results


def page(results: Results, found: Findings, folder: Path) -> str:
    """Draws the figures into `folder`; returns the page that shows them."""
    from trajshift.experiments.landscape.playground import playground_html

    made = Page("Why trajectory shifting works, in the plane")
    made.paragraph(
        "Meta-learning looks for a start, phi, from which a few steps of gradient descent bring every task to a low "
        "loss. With two parameters and eight tasks all of it can be seen: how good each start is, where methods "
        "come to rest, and what they cost. Sections 3.3 to 4.1 of Shin et al. (ICML 2021), rerun.",
        "lead",
    )
    _tasks(made, results, folder)
    _horizon(made, results, folder)
    _paths(made, results, folder)
    _comparison(made, results, found, folder)
    made.heading("What holds in this run")
    made.paragraph(found.setting, "quiet")
    claims = [[claim.verdict, claim.text, claim.evidence] for claim in found.claims]
    made.table(Table(["", "claim", "in numbers"], claims), text=(1, 2))
    made.heading("Try it")
    made.markup(playground_html())
    return made.html()


def _tasks(made: Page, results: Results, folder: Path) -> None:
    made.heading("Eight tasks of one shape")
    made.paragraph(
        "All tasks are copies of one function with four minima (Himmelblau's), scaled by three. A learner that "
        "starts at phi slides into one of the four, and which one changes abruptly as phi crosses a ridge: the source "
        "of everything below. The dashed square is the part of the plane that the other figures show."
    )
    made.figure(save(drawing.template_figure(results), "4a", folder), "Figure 4(a) of the paper: the template.")
    made.paragraph(
        "Each task moves the template's centre to one of the eight red dots and turns it by its own angle, so the "
        "tasks share their shape and nothing else; no point is a minimum of all. A good phi is one from which "
        "a minimum of each can be reached."
    )
    made.figure(save(drawing.task_figure(results), "4b", folder), "Figure 4(b): the first task, moved and turned.")


def _horizon(made: Page, results: Results, folder: Path) -> None:
    longest, bias = results.settings.horizon, results.bias.mean(0)
    made.heading("Why the trajectory must be long, and what that costs")
    made.paragraph(
        f"Choose phi so that the loss after k steps is lowest, then take {longest} steps from it. The phi that is best "
        f"for k = {longest // 4} ends at a loss of {bias[longest // 4]:.2f}, the phi that is best for k = {longest} at "
        f"{bias[-1]:.3f} (means over {len(results.bias)} random sets). Meta-learning with short trajectories, "
        "because they are cheap, chooses a start that is bad for long ones. This is the short-horizon bias."
    )
    made.figure(
        save(drawing.bias_figure(results), "4c", folder),
        f"Figure 4(c): loss after {longest} Adam steps from the grid point that is best after k steps; mean and 95% "
        "interval. The curve of a single set, dashed, is a staircase: the best grid point changes at a few k.",
    )
    costs = {method: int(made_run.inner_steps[-1]) for method, made_run in results.runs.items()}
    made.paragraph(
        f"Long trajectories are costly if every meta-update needs a new one: {results.settings.updates} meta-updates "
        f"cost Reptile {costs['reptile']:,} inner steps per task. Trajectory shifting moves phi at every step "
        f"and moves the running trajectory with it: {costs['trajectory-shifting']:,} steps. Replaying the trajectory "
        f"from each new phi, which is exact, costs {costs['accurate']:,}."
    )
    made.figure(
        save(drawing.cost_figure(results), "4d", folder),
        "Figure 4(d): cumulative inner steps, replays included, as `MetaTrainer` counts them.",
    )


def _paths(made: Page, results: Results, folder: Path) -> None:
    (short, few), (long, many) = results.optima.items()
    made.heading("Why a growing trajectory helps")
    made.paragraph(
        f"With k = {short} the learners barely move, the direction of phi is smooth, and all starts flow to "
        f"{few.cluster_count} places. With k = {long} a small change of phi sends learners to other minima, the "
        f"direction jumps, and there are {many.cluster_count} places to get stuck in. Trajectory shifting sees both: "
        "after a reset its trajectories are short and phi follows the smooth picture, then they grow."
    )
    made.figure(
        save(drawing.optima_figure(results), "5ab", folder),
        f"Figures 5(a) and 5(b): Reptile from a grid of starts. A red dot is a phi that maps to itself once rounded to "
        f"0.001; points within 0.05 form a cluster. {_fates(few.fates, short)} {_fates(many.fates, long)}",
    )
    made.paragraph(
        "The background shows how good each point is as a start, dark is good; methods see none of it. Reptile rests "
        "at the first optimum of the long-horizon picture on its way. Trajectory shifting keeps moving: each reset "
        "throws it back to the smooth picture. The first start was chosen to show what the paper describes, the four "
        "others are a square around the centre."
    )
    made.figure(
        save(drawing.trajectories_figure(results), "5cd", folder),
        f"Figures 5(c) and 5(d): {results.settings.updates} meta-updates of each method from white dots to markers.",
    )


def _fates(fates: dict[str, int], k: int) -> str:
    return f"At k = {k}, of {sum(fates.values())} starts " + ", ".join(f"{n} {fate}" for fate, n in fates.items()) + "."


def _comparison(made: Page, results: Results, found: Findings, folder: Path) -> None:
    made.heading("One set of tasks proves little")
    made.paragraph(
        f"Pictures of one set can be chosen. So every method runs on {results.settings.sets} sets with random angles "
        f"from {results.settings.starts_side**2} starts each, once with as many meta-updates and once with as many "
        "inner steps for all. The tables count the starts that left the domain or overflowed."
    )
    made.figure(
        save(drawing.comparison_figure(results, found.quality), "comparison", folder),
        "Not in the paper: quality of the final phi, mean over random sets and 95% interval.",
    )
    for table in found.tables:
        made.table(table)
