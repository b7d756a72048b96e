"""Whether the trials of an earlier version of vimtune belong to the search that goes on with them.

A trial states the options that its space says. The others were the defaults of the version that ran it. With
other defaults it would be compared with trials of something else, and what is found would not be what had
scored best.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vimtune.recipe import Recipe, changed_options
from vimtune.run_folder import RunFolder
from vimtune.search.plan import PLAN
from vimtune.training.identity import in_one_line
from vimtune.training.result import read_result


def refuse_other_defaults(recipes: Iterable[Recipe]) -> None:
    """Compare the options that finished trials had with those that they would have now.

    Args:
        recipes: those of the trials, as they would be begun now. One without a report says nothing.

    Raises:
        ValueError: a default is another one. The message says which, and where to state what it was.
    """
    kept: dict[str, dict[str, Any]] = {}
    problems: dict[str, None] = {}
    for recipe in recipes:
        folder = RunFolder(Path(str(recipe.run.output_dir)))
        if not folder.report.is_file():
            continue
        for option in changed_options(read_result(folder.path).report.method_config, recipe.method):
            if option.is_default:
                kept.setdefault(option.method, {})[option.name] = option.was
                problems[str(option)] = None
    if problems:
        parts = "; ".join(f"options: {in_one_line(own)} in each part of {name}" for name, own in kept.items())
        raise ValueError(
            f"the trials so far had other defaults: {'; '.join(problems)}. To go on with them, state these "
            f"options in {PLAN} of the search ({parts}), or search anew in another folder"
        )
