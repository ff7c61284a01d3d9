"""All that the landscape's figures, findings and page are made from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trajshift.experiments.landscape.measure import End, Settings
from trajshift.experiments.landscape.resting import Optima
from trajshift.experiments.landscape.vectorized_loop import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All that the figures draw and the findings report."""

    settings: Settings
    ends: dict[str, dict[str, End]]
    """Unit of the budget -> method -> all random sets."""
    yardsticks: Tensor
    """`[2, S]`, good and worst quality in each random set."""
    published: dict[str, End]
    """Method -> the published tasks from the fine grid."""
    published_yardstick: Tensor
    """`[2, 1]`."""
    bias: Tensor
    """`[bias_sets, K+1]`."""
    bias_published: Tensor
    """`[K+1]`."""
    optima: dict[int, Optima]
    """k -> the published tasks."""
    clusters: dict[int, list[int]]
    """k -> number of clusters in each random set."""
    runs: dict[str, Run]
    """Method -> from the fixed starts on the published tasks."""
    contour: Tensor
    """`[side, side]`."""
