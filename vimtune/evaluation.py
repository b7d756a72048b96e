"""Scores of a model on the data of a task, with an adapter or without: the command `evaluate`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vimtune.console import build_console, neutral, print_line
from vimtune.merged import is_merged_file
from vimtune.origin import adapter_path, recipe_of_trained
from vimtune.output import check_output, write_output
from vimtune.recipe import Recipe, load_recipe
from vimtune.schema import finite_json
from vimtune.tasks import Evaluation, Task
from vimtune.text import csv_cell, printable, quote
from vimtune.training.distributed import open_processes
from vimtune.training.evaluate import evaluate
from vimtune.training.precision import build_autocast
from vimtune.training.settings import process_settings
from vimtune.training.sharding import Replicated
from vimtune.utils import suggest

SPLITS = ("test", "val")
"""What can be scored: the split of a run's result, or the one that selects its best epoch."""


def run_evaluate(
    *,
    values: Mapping[str, Any],
    config: str | None,
    variant: str | None,
    adapter: Path | None,
    split: str,
    outputs: Sequence[Path],
) -> int:
    """`vimtune evaluate`: write the files asked for, print a table. Returns the exit code.

    Args:
        values: keys of the recipe, as flags give them.
        config, variant: the recipe that they change; not with an adapter, which has its own.
        adapter: an adapter file, a run folder or a merged file.
        split: one of `SPLITS`.
        outputs: .csv or .json files.

    Raises:
        ValueError: the recipe, the data, the model or the adapter do not allow it, or a file cannot be
            written.
    """
    check_split(split)
    file = None if adapter is None else adapter_path(adapter)
    for output in outputs:
        check_output(output, FORMATS, [] if file is None else [file])
    if file is not None and config is not None:
        raise ValueError("--config and --adapter: an adapter has a recipe of its own; change it by flags")
    if file is not None and is_merged_file(file) and "dataset" not in values:
        raise ValueError(
            f"{quote(str(file))} is a merged file, which says nothing of its data: name them with --dataset"
        )
    stored = {} if file is None else recipe_of_trained(file, values)
    recipe = load_recipe(config, {**stored, **values}, variant)
    with (
        open_processes(recipe.run.device) as processes,
        process_settings(recipe.run, processes.device),
    ):
        trial = recipe.task.open_trial(recipe, processes, split, file, recipe.run.force)
        try:
            found = evaluate(
                trial.model,
                trial.loader,
                trial.tally,
                device=processes.device,
                autocast=build_autocast(recipe.optimisation.amp, processes.device),
                placement=Replicated(processes),
            )
        finally:
            trial.loader.close()
        assert found is not None, "nobody stops it"
        if not processes.is_main:
            return 0
        result = {
            **describe(recipe, file, trial.loader.split, trial.loader.source),
            "loss": found.loss,
            **found.scores,
            "count": found.count,
        }
        for output in outputs:
            _write(output, result, trial.examples(found))
        console = build_console(is_result=not outputs)
        print_evaluation(recipe.task, result, found, console)
        for output in outputs:
            print_line(console, f"scores written to {output}")
    return 0


def check_split(split: str) -> None:
    """Raise ValueError for a split, given by the flag --split, whose examples cannot be asked for."""
    if split not in SPLITS:
        raise ValueError(f"--split {quote(split)}: expected {' or '.join(SPLITS)}.{suggest(split, SPLITS)}")


def describe(recipe: Recipe, adapter: Path | None, split: str, source: str) -> dict[str, Any]:
    """What was scored."""
    return {
        "task": recipe.task.name,
        "model": recipe.backbone.model,
        "adapter": None if adapter is None else str(adapter),
        "split": split,
        "data": source,
    }


def print_evaluation(task: Task, result: Mapping[str, Any], found: Evaluation, console: Console) -> None:
    """Print the scores and what they belong to."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for score in task.scores:
        value = found.scores[score.name]
        if value is not None:
            table.add_row(f"{score.title} ({result['split']})", score.show(value))
    table.add_row(f"loss ({result['split']})", f"{found.loss:.4f}")
    table.add_row(task.examples, f"{found.count:,}")
    table.add_row("model", neutral(str(result["model"]), console))
    table.add_row("adapter", neutral(str(result["adapter"] or "none"), console))
    table.add_row("data", neutral(str(result["data"]), console))
    console.print(table)


def to_json(result: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """The scores and, where the task knows it, what was found for every example."""
    return finite_json({**result, **({"examples": list(examples)} if examples else {})}, indent=1) + "\n"


def to_csv(result: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """One row: the scores and what they belong to."""
    del examples
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(result)
    writer.writerow([csv_cell(printable(v)) if isinstance(v, str) else v for v in result.values()])
    return text.getvalue()


FORMATS: dict[str, Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], str]] = {
    ".csv": to_csv,
    ".json": to_json,
}
"""How a file is written whose name ends so."""


def _write(output: Path, result: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
    content = FORMATS[output.suffix.lower()](result, examples).encode("utf-8", "backslashreplace")

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_output(output, write)
