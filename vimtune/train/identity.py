"""What makes a run the same run: when a state may be continued, and when processes may work together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vimtune.recipe import Recipe
from vimtune.schema import STRICT, Count
from vimtune.text import quote

IDENTITY = (
    "dataset",
    "dataset_kwargs",
    "data_seed",
    "train_split",
    "model",
    "model_kwargs",
    "img_size",
    "peft",
    "targets",
    "layers",
    "method_kwargs",
    "batch_size",
    "grad_accum",
    "seed",
)
"""What a state belongs to: with another value it could not be loaded, or would mean something else."""

HARMLESS = (
    "data_dir",
    "download",
    "num_workers",
    "cache",
    "checkpoint",
    "pretrained",
    "output_dir",
    "resume",
    "force",
    "log_interval",
    "cuda_graph",
)
"""May change without a word: no influence on the weights (another base is found by its identity)."""


class ResumeError(ValueError):
    """A checkpoint that cannot be continued, and why."""


@dataclass
class Facts:
    """What the weights of a run depend on besides its recipe. Written as JSON into its states.

    `data` holds a fingerprint of the images of every split in use, and `processes` says how many processes
    trained; states of earlier versions have neither.
    """

    __pydantic_config__ = STRICT

    classes: list[str]
    train_images: Count
    base_hash: str
    base_origin: str = ""
    """Empty in states of earlier versions, whose `base_hash` is of the first format."""
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    processes: Count | None = None


def lasting(recipe: Recipe) -> Recipe:
    """`recipe` without what was asked of one session of the run alone."""
    return recipe.replace(resume=None, force=False)


def settings_of_all(recipe: Recipe) -> dict[str, Any]:
    """The settings that must be the same in all processes of a run."""
    values = recipe.to_dict()
    shared = {name: value for name, value in values.items() if name not in HARMLESS}
    return shared | {"whether a run is resumed": recipe.resume is not None}


def facts_of_all(facts: Facts, step: int) -> dict[str, Any]:
    """The facts that must be the same in all processes of a run, which stands before `step`."""
    splits = {f"the {split!r} data": fingerprint for split, fingerprint in facts.data.items()}
    return {
        "the classes": facts.classes,
        **splits,
        "the base weights": facts.base_origin,
        "the step of the state": step,
    }


def changed(saved: Recipe, recipe: Recipe, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """The settings among `names` that differ: name, value that was saved, value now."""
    values = [(name, getattr(saved, name), getattr(recipe, name)) for name in names]
    return [(name, quote(was), quote(now)) for name, was, now in values if was != now]


def compare(saved_recipe: Recipe, saved: Facts, recipe: Recipe, facts: Facts, same_base: bool) -> list[str]:
    """Compare the run of a state with the run about to continue it.

    `same_base` tells whether both build on the same base weights.

    Returns:
        One line for each change that makes the rest differ from an uninterrupted run.

    Raises:
        ResumeError: naming everything that makes the state unusable here. Changed data and base weights
            count as notes where the recipe has `force`.
    """
    problems = [
        f"{name} was {was} and is now {now}" for name, was, now in changed(saved_recipe, recipe, IDENTITY)
    ]
    problems += _other_classes(saved.classes, facts.classes)
    doubts = _other_data(saved, facts) + ([] if same_base else ["the base weights are others"])
    if problems or (doubts and not recipe.force):
        advice = "Resume with the run's own settings and data, or start a new run in another folder"
        if not problems:
            advice += "; --force continues nevertheless and says so in the report"
        raise ResumeError(
            "this checkpoint belongs to another run: " + "; ".join([*problems, *doubts]) + ". " + advice
        )
    return [f"resumed although {doubt} (--force)" for doubt in doubts] + _notes(
        saved_recipe, saved, recipe, facts
    )


def _other_classes(saved: list[str], now: list[str]) -> list[str]:
    if len(saved) != len(now):
        return [f"it has {len(saved)} classes and the data now {len(now)}"]
    changed = [a for a, b in zip(saved, now, strict=True) if a != b]
    return [f"the class names differ (such as {quote(changed[0])})"] if changed else []


def _other_data(saved: Facts, now: Facts) -> list[str]:
    doubts = []
    if saved.train_images != now.train_images:
        doubts.append(f"training images were {saved.train_images} and are now {now.train_images}")
    doubts += [
        f"the images of {quote(split)} are others (one was added, removed, renamed, moved or replaced)"
        for split, fingerprint in now.data.items()
        if saved.data.get(split, fingerprint) != fingerprint
    ]
    if "test" in saved.data and "test" not in now.data:
        doubts.append("there are no test images any more")
    return doubts


def _notes(saved_recipe: Recipe, saved: Facts, recipe: Recipe, facts: Facts) -> list[str]:
    notes = []
    names = [name for name in recipe.to_dict() if name not in (*IDENTITY, *HARMLESS)]
    for name, was, now in changed(saved_recipe, recipe, names):
        effect = "; the learning rate jumps to the new run's curve" if name == "epochs" else ""
        notes.append(f"resumed with {name} = {now} (was {was}){effect}")
    if saved.processes not in (None, facts.processes):
        notes.append(
            f"resumed with processes = {facts.processes} (was {saved.processes}); random numbers such as "
            "those of dropout, and the order of sums, are others than without the change"
        )
    if not saved.data:
        notes.append("resumed from a state without fingerprints: whether its images changed cannot be told")
    return notes
