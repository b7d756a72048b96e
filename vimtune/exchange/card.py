"""The model card of what is passed on: what it is, how it scored, how it is loaded, how it was trained.

It is made from the adapter file and, where the adapter lies in its run folder, from the report of the run.
All texts of others in it are written so that Markdown shows them as they are, and none is a path of the
computer that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from vimtune import __version__
from vimtune.adapters import AdapterInfo
from vimtune.exchange.base import base_on_hub, shared_recipe
from vimtune.exchange.formats import Format
from vimtune.methods.full import Full
from vimtune.methods.linear import LinearProbe
from vimtune.run_folder import RunFolder
from vimtune.tasks.base import Score
from vimtune.tasks.origin import task_of
from vimtune.text import escape_markdown, quote, shorten
from vimtune.training.result import Result, read_result

MAX_CLASSES = 100
"""Names of classes that a card lists."""
_LICENSE = r"[a-z0-9][a-z0-9.-]{0,63}"
"""How the hub writes the name of a license."""


def check_license(license: str | None) -> None:
    """Make sure that the hub knows what is meant by a license.

    Raises:
        ValueError: it is not written as the hub writes the names of licenses.
    """
    if license is not None and not re.fullmatch(_LICENSE, str(license)):
        raise ValueError(
            f"license = {quote(license)}: expected its name on the Hugging Face hub, in lower-case letters, "
            "digits, dots and hyphens: apache-2.0, mit, cc-by-nc-4.0, or other"
        )


def write_card(
    info: AdapterInfo, adapter: Path, form: Format, loading_code: str, place: str, license: str | None = None
) -> str:
    """The text of a README.md.

    Args:
        info: what the adapter file says about itself.
        adapter: the file; beside it in a run folder there may be a report.
        form: in which format it is passed on.
        loading_code: Python that loads it, with "{place}" for the repository.
        place: name of the repository, or of the folder.
        license: its name on the hub, such as "apache-2.0"; the card names none if None.
    """
    result = _result_beside(adapter)
    task = task_of(info)
    title = place.rpartition("/")[2]
    recipe = shared_recipe(info)
    parts = [
        f"---\n{_metadata(info, result, form, title, task.hub_task, recipe, license)}\n---",
        f"# {escape_markdown(title)}",
        f"{escape_markdown(_sentence(info, form, recipe))} Made by vimtune {__version__}.",
        _table(("", ""), _facts(info, result)),
    ]
    if result is not None:
        parts += ["## Scores", _table(("score", escape_markdown(result.report.split)), _scores(result))]
    parts += ["## Use", f"```python\n{loading_code.replace('{place}', place)}\n```"]
    if info.classes:
        shown = ", ".join(escape_markdown(shorten(name, 80)) for name in info.classes[:MAX_CLASSES])
        more = len(info.classes) - MAX_CLASSES
        parts += ["## Classes", shown + (f", and {more} more" if more > 0 else "")]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).replace("```", "'''")
        parts += ["## Training", f"```yaml\n{text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _result_beside(adapter: Path) -> Result | None:
    """The result of the run in whose folder an adapter lies; None where there is none that can be read."""
    if adapter != RunFolder(adapter.parent).adapter:
        return None
    try:
        return read_result(adapter.parent)
    except ValueError:
        return None


def _metadata(
    info: AdapterInfo,
    result: Result | None,
    form: Format,
    title: str,
    hub_task: str | None,
    recipe: Mapping[str, Any],
    license: str | None,
) -> str:
    """The YAML by which the hub finds and shows it."""
    found = []
    if result is not None:
        source = str(recipe.get("dataset") or recipe.get("task") or "own data")
        found = [
            EvalResult(
                task_type=hub_task or "other",
                dataset_type=source,
                dataset_name=source,
                dataset_split=result.report.split,
                metric_type=score.hub_metric or score.name,
                metric_name=score.title,
                metric_value=value,
            )
            for score, value in _task_scores(result)
        ]
    base = base_on_hub(info)
    is_model = form.whole_model or _trains_everything(info)
    relation = None if base is None else "finetune" if is_model else "adapter"
    data = ModelCardData(
        license=license,
        library_name=form.library_of(info),
        tags=["vimtune", "mamba", *info.method.split("+")],
        pipeline_tag=hub_task,
        base_model=base,
        base_model_relation=relation,
        model_name=title if found else None,
        eval_results=found or None,
        ignore_metadata_errors=True,
    )
    return str(data.to_yaml()).strip()


def _sentence(info: AdapterInfo, form: Format, recipe: Mapping[str, Any]) -> str:
    """What it is: an adapter, a head, a merged model, or one of which all weights were trained."""
    model = (info.model.get("name") if info.model else recipe.get("model")) or "a model"
    # Of images the data set is known, or nothing is; the task of texts says what they were.
    data = recipe.get("dataset") or (None if info.model else recipe.get("task"))
    trained = f"trained on {data}" if isinstance(data, str) else "trained"
    if _trains_everything(info):
        return f"{model}, all weights of which were {trained}."
    if info.method == LinearProbe.name:
        return f"{model} with a head {trained}." if form.whole_model else f"Head for {model}, {trained}."
    if form.whole_model:
        return f"{model}, {trained} by {info.method} and merged into plain weights."
    return f"Adapter ({info.method}) of {model}, {trained}."


def _trains_everything(info: AdapterInfo) -> bool:
    """Whether the file holds all weights of its model."""
    return info.method == Full.name and info.layers is None


def _facts(info: AdapterInfo, result: Result | None) -> Iterator[tuple[str, str]]:
    yield "method", info.method
    for method, options in info.options.items():
        shown = ", ".join(f"{name}={_short(value)}" for name, value in options.items())
        if shown:
            yield f"options of {method}", shorten(shown, 400)
    if info.model:
        yield "model", str(info.model["name"])
    if info.num_classes:
        yield "classes", str(info.num_classes)
    if result is not None:
        report = result.report
        trained, total = report.trainable_parameters, report.total_parameters
        yield "trained parameters", f"{trained:,} of {total:,} ({100 * trained / total:.2f} %)"
        yield "epochs", f"{report.epochs}, the best one is {report.best_epoch} (by {report.selected_by()})"
        yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _short(value: Any) -> str:
    return "by target" if isinstance(value, dict) else str(value)


def _task_scores(result: Result) -> Iterator[tuple[Score, float]]:
    """The scores of the task that have a value."""
    values = result.report.scores_by_name()
    for score in result.recipe.task.scores:
        value = values.get(score.name)
        if value is not None:
            yield score, value


def _scores(result: Result) -> Iterator[tuple[str, str]]:
    report = result.report
    for score, value in _task_scores(result):
        yield score.title, score.show(value)
    yield from report.further_scores()
    if report.loss is not None:
        yield "loss", f"{report.loss:.4f}"
    count = report.num_scored()
    if count is not None:
        yield "scored on", f"{count:,} {result.recipe.task.examples}"


def _table(heading: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|"]
    lines += [f"| {escape_markdown(name)} | {escape_markdown(value)} |" for name, value in rows]
    return "\n".join(lines)
