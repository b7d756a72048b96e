"""What makes a run the same run: when a state may be continued, and when processes may work together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vimtune.adapters import BaseIdentity
from vimtune.recipe import OPTIONS_OF_METHODS, Recipe, options_then
from vimtune.schema import STRICT, Count
from vimtune.text import quote

IDENTITY = (
    "task",
    "head",
    "pooling",
    "text_column",
    "label_column",
    "dataset",
    "dataset_kwargs",
    "data_seed",
    "train_split",
    "balanced",
    "shots",
    "train_size",
    "folds",
    "limit",
    "val_share",
    "max_length",
    "model",
    "model_kwargs",
    "tokenizer",
    "img_size",
    "peft",
    "targets",
    "layers",
    "budget",
    "opt",
    "batch_size",
    "grad_accum",
    "seed",
)
"""What a state belongs to: with another value it could not be loaded, or would mean something else. The
options of its methods are compared as well, with their defaults; see `Facts.methods`."""

HARMLESS = (
    "data_dir",
    "train_file",
    "val_file",
    "test_file",
    "download",
    "num_workers",
    "checkpoint",
    "pretrained",
    "output_dir",
    "resume",
    "force",
    "logger",
    "log_interval",
    "pictures",
    "cuda_graph",
)
"""May change without a word: no influence on the weights (another base is found by its identity)."""


class ResumeError(ValueError):
    """A checkpoint that cannot be continued, and why."""


@dataclass
class Facts:
    """What the weights of a run depend on besides its recipe. Written as JSON into its states.

    `outputs` says what the outputs of the model mean, such as {"classes": [...]}, and `train_examples` how
    many examples the training split holds. `data` has a fingerprint of every split in use, and `processes`
    says how many processes trained; states of earlier versions have neither. `readers` are those of the job.
    `methods` has every option of each method, defaults included: a recipe names what was given alone, and
    another version may have other defaults.
    """

    __pydantic_config__ = STRICT

    outputs: dict[str, list[str]]
    train_examples: Count
    base_hash: str
    base_origin: str = ""
    """Empty in states of earlier versions, whose `base_hash` is of the first format."""
    replaced_hash: str = ""
    """Empty in states of earlier versions, as is `replaced_origin`."""
    replaced_origin: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    processes: Count | None = None
    readers: dict[str, str] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Empty in states of earlier versions."""

    @property
    def base(self) -> BaseIdentity:
        """Identity of the base weights."""
        return BaseIdentity(origin=self.base_origin, bits=self.base_hash)

    @property
    def replaced(self) -> BaseIdentity:
        """Identity of the base weights that the adapter replaces."""
        return BaseIdentity(origin=self.replaced_origin, bits=self.replaced_hash)


def lasting(recipe: Recipe) -> Recipe:
    """`recipe` without what was asked of one session of the run alone."""
    return recipe.replace(resume=None, force=False)


def settings_of_all(recipe: Recipe) -> dict[str, Any]:
    """The settings that must be the same in all processes of a run."""
    values = recipe.to_dict()
    shared = {name: value for name, value in values.items() if name not in HARMLESS}
    return shared | {"whether a run is resumed": recipe.run.resume is not None}


def facts_of_all(facts: Facts, step: int) -> dict[str, Any]:
    """The facts that must be the same in all processes of a run, which stands before `step`."""
    splits = {f"the {split!r} data": fingerprint for split, fingerprint in facts.data.items()}
    return {
        **{f"the {name}": meanings for name, meanings in facts.outputs.items()},
        **splits,
        **{f"the {name}": reader for name, reader in facts.readers.items()},
        "the base weights": [facts.base_origin, facts.replaced_origin],
        "the step of the state": step,
    }


def changed(saved: Recipe, recipe: Recipe, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """The settings among `names` that differ: name, value that was saved, value now."""
    before, after = saved.to_dict(), recipe.to_dict()
    values = [(name, before.get(name), after.get(name)) for name in names]
    return [(name, quote(was), quote(now)) for name, was, now in values if was != now]


def changed_options(saved: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """One line for each option of a method that is not the same.

    Args:
        saved: all options of a run, method -> option -> value, beside which there may be more.
        recipe: that of the run now.
    """
    return [
        f"{name} of {method} was {quote(saved[method][name])} and is now {quote(now)}"
        for method, options in recipe.method.all_options.items()
        if method in saved
        for name, now in options.items()
        if saved[method].get(name, now) != now
    ]


def compare(saved_recipe: Recipe, saved: Facts, recipe: Recipe, facts: Facts, same_base: bool) -> list[str]:
    """Compare the run of a state with the run about to continue it.

    `same_base` tells whether both build on the same base weights.

    Returns:
        One line for each change that makes the rest differ from an uninterrupted run.

    Raises:
        ResumeError: naming everything that makes the state unusable here. Changed data, readers and
            base weights count as notes where the recipe has `force`.
    """
    problems = [
        f"{name} was {was} and is now {now}" for name, was, now in changed(saved_recipe, recipe, IDENTITY)
    ]
    examples = recipe.task.examples
    problems += changed_options(saved.methods or options_then(saved_recipe.method), recipe)
    problems += _other_outputs(saved.outputs, facts.outputs)
    doubts = _other_data(saved, facts, examples) + _other_readers(saved, facts)
    doubts += [] if same_base else ["the base weights are others"]
    if problems or (doubts and not recipe.run.force):
        advice = "Resume with the run's own settings and data, or start a new run in another folder"
        if not problems:
            advice += "; --force continues nevertheless and says so in the report"
        raise ResumeError(
            "this checkpoint belongs to another run: " + "; ".join([*problems, *doubts]) + ". " + advice
        )
    return [f"resumed although {doubt} (--force)" for doubt in doubts] + _notes(
        saved_recipe, saved, recipe, facts, examples
    )


def _other_outputs(saved: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> list[str]:
    """One line for each kind of outputs, such as "classes", that is not the same."""
    problems = []
    for kind in dict.fromkeys([*saved, *now]):
        before, after = saved.get(kind, []), now.get(kind, [])
        if len(before) != len(after):
            problems.append(f"it has {len(before)} {kind} and the data now {len(after)}")
        elif renamed := [a for a, b in zip(before, after, strict=True) if a != b]:
            problems.append(f"the names of the {kind} differ (such as {quote(renamed[0])})")
    return problems


def _other_data(saved: Facts, now: Facts, examples: str) -> list[str]:
    """One line for each difference of the data, which consist of `examples`, such as "images"."""
    doubts = []
    if saved.train_examples != now.train_examples:
        doubts.append(f"training {examples} were {saved.train_examples} and are now {now.train_examples}")
    doubts += [
        f"the {examples} of {quote(split)} are others (one was added, removed, renamed, moved or replaced)"
        for split, fingerprint in now.data.items()
        if saved.data.get(split, fingerprint) != fingerprint
    ]
    if "test" in saved.data and "test" not in now.data:
        doubts.append(f"there are no test {examples} any more")
    return doubts


def _other_readers(saved: Facts, now: Facts) -> list[str]:
    """One line for each that is not the same; states of earlier versions do not tell."""
    return [
        f"the {name} is another"
        for name, reader in now.readers.items()
        if saved.readers.get(name, reader) != reader
    ]


def _notes(saved_recipe: Recipe, saved: Facts, recipe: Recipe, facts: Facts, examples: str) -> list[str]:
    """One line for each change that makes the rest of the run differ."""
    notes = []
    compared = (*IDENTITY, *HARMLESS, *OPTIONS_OF_METHODS, "peft_kwargs")
    names = [name for name in recipe.to_dict() if name not in compared]
    for name, was, now in changed(saved_recipe, recipe, names):
        effect = "; the learning rate jumps to the new run's curve" if name == "epochs" else ""
        notes.append(f"resumed with {name} = {now} (was {was}){effect}")
    if saved.processes not in (None, facts.processes):
        notes.append(
            f"resumed with processes = {facts.processes} (was {saved.processes}); random numbers such as "
            "those of dropout, and the order of sums, are others than without the change"
        )
    if not saved.data:
        notes.append(
            f"resumed from a state without fingerprints: whether its {examples} changed cannot be told"
        )
    return notes
