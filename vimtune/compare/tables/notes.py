"""What is said beside the tables of a comparison: how its runs were made, and what a reader has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vimtune.compare.plan import Plan
from vimtune.compare.results import Row
from vimtune.text import counted

OF_RUNS = (
    "Runs that differ in nothing but the seed and the data seed are one row, of which scores are means and "
    "standard deviations (n - 1)."
)
"""What is said above tables of runs that no plan knows."""

PAIRED = (
    "Means over pairs of runs with the same seed, ± their standard error; that of the last column takes the "
    "data sets as given. The errors say nothing of what other test images would change."
)
"""What is said above a table of differences."""


MAX_WARNINGS = 5
"""Different warnings of runs that are repeated beside the tables."""


def protocol_of(plan: Plan) -> str:
    """How the learning rates of a comparison are chosen, and on what its scores are, in words."""
    chosen_with, over = f"seeds {_listed(plan.lr_seeds)}", f"the seeds ({_listed(plan.options.seeds)})"
    others = "the other seeds are"
    if (data_seeds := plan.options.data_seeds) is not None:
        count = len(data_seeds) * len(plan.options.seeds)
        over = f"the {count} pairs of {over} and the data seeds ({_listed(data_seeds)})"
        chosen_with += f", data seed {data_seeds[0]}"
        others = "the other seeds and data seeds are"
    words = f"Scores are means and standard deviations (n - 1) over {over}."
    if len(plan.options.seeds) * len(plan.data_seeds) == 1:
        words = f"Each score is that of one run, with seed {plan.options.seeds[0]}."
    if any(len(plan.rates(*pair)) > 1 for pair in plan.pairs):
        words = (
            "For each method on each data set the validation split chooses the learning rate among those of "
            f"its grid ({chosen_with}); {others} run with that one alone. {words}"
        )
    if plan.options.jobs > 1:
        words += f" {plan.options.jobs} runs at a time shared a device, which the times include."
    return words


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def remarks_on(rows: Sequence[Row], escape: Callable[[str], str] = str) -> list[str]:
    """What a reader of the tables has to know besides; `escape` makes names of data sets harmless where the
    remarks are shown."""
    remarks = ["Trained parameters do not count the head; `with head` does."]
    if any(row.soup for row in rows):
        remarks.append("`soup` is the score of one adapter, the average of those of all seeds.")
    own = [row for row in rows if any(r.report.split == r.report.selection_split for r in row.results)]
    chosen = ["epochs"] if any(result.had_a_choice for row in own for result in row.results) else []
    chosen += ["learning rates"] if any(row.tried > 1 for row in own) else []
    if chosen:
        remarks.append(
            f"Of {_data_of(own, escape)} the split of the scores also chose the "
            f"{' and '.join(chosen)}, which makes them optimistic."
        )
    runs = [result for row in rows for result in row.results]
    warned = Counter(warning for run in runs for warning in run.report.warnings)
    remarks += [
        f"Warning of {count} of {counted(len(runs), 'runs')}: {escape(warning)}"
        for warning, count in warned.most_common(MAX_WARNINGS)
    ]
    if len(warned) > MAX_WARNINGS:
        remarks.append(f"Their reports have {counted(len(warned) - MAX_WARNINGS, 'more warnings')}.")
    if same := [row for row in rows if not row.data_differ]:
        remarks.append(
            f"The data seeds draw nothing of {_data_of(same, escape)}, whose data are the same with "
            "each: such runs are no draws of the data (shots or train_size are), and their spread says less."
        )
    return remarks


def _data_of(rows: Iterable[Row], escape: Callable[[str], str]) -> str:
    """The data sets of rows, each once."""
    return ", ".join(map(escape, dict.fromkeys(row.data for row in rows)))
