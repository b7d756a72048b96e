"""What a search leaves behind: a table of its trials as Markdown and CSV, and a picture of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vimtune.console import neutral
from vimtune.search.space import Drawn
from vimtune.search.study import Trial
from vimtune.tasks.base import Score
from vimtune.text import counted, printable, table_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10
"""Trials of the printed table."""
LISTED = 1000
"""Trials of the Markdown table; the CSV file has all of them."""
_HEADINGS = ("trial", "state", "score", "epoch", "parameters", "seconds")

Describe = Callable[[Trial], Drawn]
"""What is to be shown of what a trial has drawn."""


def describe(drawn: Drawn) -> str:
    """What was drawn, as a line such as "lora_X (rank 8, alpha 0.8), A; lr 0.001"."""
    parts = []
    for name, options in drawn.parts.items():
        inside = ", ".join(f"{option} {_show(value)}" for option, value in options.items())
        parts.append(f"{name} ({inside})" if inside else name)
    keys = ", ".join(f"{key} {_show(value)}" for key, value in drawn.keys.items())
    return "; ".join(filter(None, [", ".join(parts) or "nothing but the head", keys]))


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


def shown(trial: Trial, score: Score) -> float:
    """The value of a trial as the task states it: a loss is positive again."""
    return trial.value if score.higher_is_better else -trial.value


def _cells(trial: Trial, score: Score) -> list[str]:
    """What tables say of a trial, below `_HEADINGS`."""
    found = trial.outcome
    if found is None:
        return [str(trial.number), "running", "", "", "", ""]
    return [
        str(trial.number),
        found.state,
        score.show(shown(trial, score)) if trial.has_value else "",
        str(found.epoch or ""),
        "" if found.parameters is None else f"{found.parameters:,}",
        f"{found.seconds:.0f}",
    ]


def to_markdown(trials: Sequence[Trial], drawn: Describe, score: Score) -> str:
    """The table of trials, in the given order."""
    heading = [*_HEADINGS, "drawn"]
    heading[heading.index("score")] = f"val {score.title}"
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for trial in trials[:LISTED]:
        reason = f"; {trial.outcome.reason}" if trial.outcome is not None and trial.outcome.reason else ""
        last = (describe(drawn(trial)) + printable(reason)).replace("|", "\\|")
        lines.append("| " + " | ".join([*_cells(trial, score), last]) + " |")
    if len(trials) > LISTED:
        lines += ["", f"{counted(len(trials) - LISTED, 'more trials')}: see trials.csv."]
    return "\n".join(lines) + "\n"


def to_csv(trials: Sequence[Trial], score: Score) -> str:
    """The table of trials with a column for everything that was drawn."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_HEADINGS, *names, "reason"])
    for trial in trials:
        found = trial.outcome
        figures = (
            ["running", "", "", "", ""]
            if found is None
            else [
                found.state,
                shown(trial, score) if trial.has_value else None,
                found.epoch,
                found.parameters,
                found.seconds,
            ]
        )
        drawn = [trial.params.get(name, "") for name in names]
        reason = "" if found is None else table_cell(found.reason)
        writer.writerow([trial.number, *figures, *map(table_cell, drawn), reason])
    return text.getvalue()


def draw_trials(trials: Sequence[Trial], winner: Trial | None, score: Score, title: str) -> Figure:
    """Scores over the order of the trials with the best one so far, and over the number of parameters.

    Args:
        trials: all, in order.
        winner: the best one, if any came to its end.
        score: what they are compared by.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from vimtune.pages.style import picture_style, whole_numbers

    with picture_style():
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        over_time, over_size = figure.subplots(1, 2, sharey=True)
        whole = [trial for trial in trials if trial.is_complete]
        ended = [trial for trial in trials if trial.has_value and not trial.is_complete]
        values = [shown(trial, score) for trial in whole]
        numbers = [trial.number for trial in whole]
        over_time.scatter(numbers, values, s=22, color="tab:blue", label="complete", zorder=3)
        if ended:
            at = [trial.number for trial in ended]
            seen = [shown(trial, score) for trial in ended]
            over_time.scatter(at, seen, s=22, color="0.6", marker="x", label="ended early")
        best: list[float] = []
        for value in values:
            choose = max if score.higher_is_better else min
            best.append(choose([value, *best[-1:]]))
        over_time.step(numbers, best, where="post", color="tab:orange", label="best so far")
        label = f"val {score.title}" + (" (%)" if score.percent else "")
        over_time.set(xlabel="trial", ylabel=label)
        over_time.xaxis.set_major_locator(whole_numbers())
        sizes = [trial.outcome.parameters or 0 for trial in whole if trial.outcome is not None]
        over_size.scatter(sizes, values, s=22, color="tab:blue", zorder=3)
        if winner is not None:
            assert winner.outcome is not None, "it came to its end"
            ring: dict[str, Any] = {
                "s": 110,
                "facecolors": "none",
                "edgecolors": "tab:orange",
                "linewidths": 1.8,
            }
            place = [winner.outcome.parameters or 0], [shown(winner, score)]
            over_size.scatter(*place, label=f"best: trial {winner.number}", zorder=4, **ring)
            over_size.legend(loc="best")
        if sizes and min(sizes) > 0 and max(sizes) > 5 * min(sizes):
            over_size.set_xscale("log")
            over_size.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            over_size.xaxis.set_minor_formatter(NullFormatter())
        over_size.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        over_size.set(xlabel="trained parameters")
        for axes in (over_time, over_size):
            axes.grid(alpha=0.3)
        over_time.legend(loc="best")
        figure.suptitle(title)
        return figure


def print_trials(trials: Sequence[Trial], drawn: Describe, score: Score, console: Console) -> None:
    """The best trials as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("trial", f"val {score.title}", "epoch", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("drawn", overflow="fold")
    for trial in trials[:SHOWN]:
        number, _, value, epoch, parameters, _ = _cells(trial, score)
        table.add_row(number, value, epoch, parameters, neutral(describe(drawn(trial)), console))
    console.print(table)
