"""The synthetic study of section 4.1 (figures 4 and 5): eight rotated copies of one function in the plane.

```python
from trajshift.experiments.landscape import grid, quality_map, run, tasks

ours = run("trajectory-shifting", grid(), tasks=tasks(seed=1))
quality = quality_map(ours.phi[-1], 101, 0.1, tasks=tasks(seed=1))[:, 100]
```
"""

from trajshift.experiments.landscape.himmelblau import DOMAIN, Landscape, grid, stack, tasks, template
from trajshift.experiments.landscape.quality import quality_map
from trajshift.experiments.landscape.resting import Optima, optima
from trajshift.experiments.landscape.vectorized_loop import OFFERED, Fates, Run, fates, run, updates

__all__ = [
    "DOMAIN",
    "OFFERED",
    "Fates",
    "Landscape",
    "Optima",
    "Run",
    "fates",
    "grid",
    "optima",
    "quality_map",
    "run",
    "stack",
    "tasks",
    "template",
    "updates",
]
