"""Scores of a model on the data of a task, with an adapter or without: `vimtune evaluate` and its function.

found = vimtune.evaluate("runs/my-run")
print(found.scores["top1"], found.mistakes()[0])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vimtune.commands.scored import FORMATS, Scored
from vimtune.console import build_console, print_line
from vimtune.data import DATASETS
from vimtune.fields import options_of
from vimtune.output import check_output, write_text
from vimtune.recipe import TASK, Recipe, keys_that_serve, load_recipe, refuse_keys_without_use
from vimtune.runtime.distributed import open_processes
from vimtune.runtime.launch import read_launch
from vimtune.tasks import TASKS
from vimtune.tasks.images.settings import DataSettings
from vimtune.tasks.origin import adapter_path, recipe_of_trained, refuse_other_model
from vimtune.text import quote, suggest
from vimtune.training.evaluate import evaluate_trial
from vimtune.training.settings import process_settings

SPLITS = ("test", "val")
"""What can be scored: the split of a run's result, or the one that selects its best epoch."""


def evaluate(
    trained: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    variant: str | None = None,
    **keys: Any,
) -> Scored:
    """Score a model on the data of its run, on other data, or on a folder.

    Args:
        trained: a run folder, an adapter file, or a merged file (of which `keys` name the data); None for the
            model that `keys` or `config` name, without any adapter.
        split: "test" or "val"; None for "test".
        config: a recipe in YAML, where there is no adapter.
        variant: which recipe of a file that is a grid of them.
        **keys: keys of the recipe that are to be others than those of the run, such as `dataset` or
            `data_dir`, and options of the evaluation: `calibrate`, and for images `folder` and `flip`. Keys
            that training alone reads, such as `lr` or `mixup`, are refused.

    Returns:
        The scores, every class, the most confused pairs, the calibration and the mistakes. Under torchrun
        every process returns those of all of them.

    Raises:
        ValueError: the recipe, the data, the model or the adapter do not allow it.
    """
    if split is not None:
        check_split(split)
    file = None if trained is None else adapter_path(trained, "trained")
    options = {name: value for name, value in keys.items() if name in _option_names()}
    values = {name: value for name, value in keys.items() if name not in options}
    refuse_keys_without_use(values, "scores", "evaluation")
    if file is not None and config is not None:
        raise ValueError("--config and --adapter: an adapter has a recipe of its own; change it by flags")
    stored = {} if file is None else keys_that_serve(recipe_of_trained(file, values), "scores")
    if file is not None:
        refuse_other_model(file, stored, values)
        if "folder" not in options:
            _demand_data(file, {**stored, **values})
    if "folder" in options:
        # What the run was limited to is no statement about the folder.
        stored = {name: value for name, value in stored.items() if name != "limit"}
        if not values.keys() & {"dataset", "data_dir"}:
            stored = _without_lost_data(stored)
    recipe = load_recipe(config, {**stored, **values}, variant)
    task = recipe.task
    chosen = task.evaluate_options.build(options, f"evaluations of task {quote(task.name)}")
    if split is not None:
        chosen.check_split(split)
    given = {name: getattr(chosen, name) for name in options}
    with (
        open_processes(recipe.run.device) as processes,
        process_settings(recipe.run, processes.device),
    ):
        trial = task.open_trial(recipe, processes, split or SPLITS[0], file, chosen, recipe.run.force)
        try:
            if trial.untrained:
                raise ValueError(trial.untrained)
            found, held_out = evaluate_trial(trial, recipe, processes)
        finally:
            trial.close()
        return Scored(
            task=task,
            facts=describe(recipe, file, trial.loader.split, trial.loader.source, given),
            evaluation=found,
            details=trial.details(found, held_out),
            examples=trial.examples(found),
        )


def _demand_data(file: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError where a file says nothing of its data, such as a merged one, and a user names none."""
    names = TASKS.get(str(values.get(TASK.name, TASK.default))).data_options.naming
    if names and all(values.get(name) is None for name in names):
        raise ValueError(f"{quote(str(file))} says nothing of its data: name them with --dataset or --folder")


def _without_lost_data(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an adapter without its data, if these have no usual place and it does not say where they
    are, as that in an adapter file alone: what is scored is a folder, and the data are not needed."""
    kind = str(stored.get("dataset"))
    if kind not in DATASETS or not DATASETS.get(kind).needs_data_dir or stored.get("data_dir") is not None:
        return dict(stored)
    names = (*DataSettings.naming, *DataSettings.dividing)
    return {name: value for name, value in stored.items() if name not in names}


def _option_names() -> set[str]:
    """Names of the options of the evaluations of every task."""
    return {name for _, task in TASKS.items() for name in options_of(task.evaluate_options)}


def run_evaluate(
    *,
    values: Mapping[str, Any],
    config: str | None,
    variant: str | None,
    adapter: Path | None,
    split: str | None,
    outputs: Sequence[Path],
    mistakes: Path | None,
) -> int:
    """`vimtune evaluate`: write the files asked for, print a table. Returns the exit code.

    Args:
        values: keys of the recipe and options of the evaluation, as flags give them.
        config, variant: the recipe that they change; not with an adapter, which has its own.
        adapter: an adapter file, a run folder or a merged file.
        split: one of `SPLITS`; None for the first of them.
        outputs: .csv, .html or .json files.
        mistakes: a .csv file for the wrong answers.

    Raises:
        ValueError: the recipe, the data, the model or the adapter do not allow it, or a file cannot be
            written.
    """
    if split is not None:
        check_split(split)
    sources = [] if adapter is None else [adapter_path(adapter)]
    for output in outputs:
        check_output(output, FORMATS, sources)
    if mistakes is not None:
        check_output(mistakes, [".csv"], sources)
        if mistakes.resolve() in [output.resolve() for output in outputs]:
            raise ValueError(f"--output and --mistakes are both {quote(str(mistakes))}: choose another file")
    scored = evaluate(adapter, split=split, config=config, variant=variant, **values)
    if read_launch().rank != 0:
        return 0
    wrong = None if mistakes is None else scored.mistakes_to_csv()
    for output in outputs:
        scored.save(output)
    if mistakes is not None and wrong is not None:
        write_text(mistakes, wrong)
    console = build_console(is_result=not outputs)
    scored.print(console)
    for output in outputs:
        print_line(console, f"scores written to {output}")
    if mistakes is not None:
        print_line(console, f"mistakes written to {mistakes}")
    return 0


def check_split(split: str) -> None:
    """Raise ValueError for a split, given by the flag --split, whose examples cannot be asked for."""
    if split not in SPLITS:
        raise ValueError(f"--split {quote(split)}: expected {' or '.join(SPLITS)}.{suggest(split, SPLITS)}")


def describe(
    recipe: Recipe, adapter: Path | None, split: str, source: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was scored, and how where options say so."""
    return {
        "task": recipe.task.name,
        "model": recipe.backbone.model,
        "adapter": None if adapter is None else str(adapter),
        "split": split,
        "data": source,
        **options,
    }
