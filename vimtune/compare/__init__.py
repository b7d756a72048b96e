"""Comparisons: methods by data sets by seeds, each with the learning rate that a validation split chooses.

| file | what |
|---|---|
| `plan.py` | what is compared, and what a single run of it is |
| `plan_keys.py`, `plan_problems.py` | the keys in which that is stated, and what may be wrong with it |
| `schedule.py` | which run comes next, and which learning rate is taken |
| `execution.py`, `worker.py` | runs made by processes of their own, and what those do |
| `soups.py` | the averages of the adapters of all seeds |
| `results.py`, `paired.py` | what finished runs have found, put together; methods compared run by run |
| `tables/`, `pictures.py` | how all of it is shown |
| `command.py`, `quickstart.py` | a comparison from beginning to end: a user's, and the one without any flag |

The protocol: each method is trained on each data set with every learning rate of its grid and every seed of
`lr_seeds`. The learning rate whose runs score best on the validation split on average, by the epoch that each
of them keeps, is the one of this method on this data set, and the other seeds are trained with it alone. With
`data_seeds`, by which few-shot examples and splits are drawn, there is a run for each pair of a seed and a
data seed; the learning rate is chosen on the first draw. The tables have the scores of the test split of the
runs with the chosen learning rates; those of the others are never looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune.compare.plan import Plan, PlanError, load_plan
from vimtune.late_names import late_names

if TYPE_CHECKING:
    from vimtune.compare.command import compare
    from vimtune.compare.results import Row

__all__ = ["Plan", "PlanError", "Row", "compare", "load_plan"]

_HOMES = {"vimtune.compare.command": ("compare",), "vimtune.compare.results": ("Row",)}
"""Modules that define the names which are imported on first use."""

__getattr__, __dir__ = late_names(__name__, _HOMES)
