"""What makes a run the same run: when a state may be continued, and when processes may work together."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from vimtune.adapters import BaseIdentity
from vimtune.recipe import OPTION_KEYS, Recipe, changed_options, keeping, options_then
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


def options_of(saved: Recipe, facts: Facts) -> Mapping[str, Any]:
    """Every option of each method of the run that has such a state."""
    return facts.methods or options_then(saved.method)


def differences(saved: Recipe, options: Mapping[str, Any], recipe: Recipe, names: Iterable[str]) -> list[str]:
    """One line for each setting that is not the same.

    Args:
        saved: the recipe of a run.
        options: all options of its methods, method -> option -> value; see `changed_options`.
        recipe: that of the run now.
        names: which settings are compared, beside the options of the methods and what a budget decides.
    """
    settings = changed(saved, recipe, (name for name in names if name not in OPTION_KEYS))
    lines = [f"{name} was {was} and is now {now}" for name, was, now in settings]
    lines += map(str, changed_options(options, recipe.method))
    return lines + _other_sizing(saved, recipe)


def _other_sizing(saved: Recipe, recipe: Recipe) -> list[str]:
    """One line for each method of which the budget decides another option, or none any more."""
    if saved.method.peft != recipe.method.peft or None in (saved.method.budget, recipe.method.budget):
        return []  # This has a line already.
    before, after = saved.method.sized_by_budget, recipe.method.sized_by_budget
    return [
        f"the budget decided {before.get(name, 'nothing')} of {name} and now {after.get(name, 'nothing')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def flag_for_defaults(options: Mapping[str, Any], recipe: Recipe) -> str | None:
    """The flag of `vimtune train` by which a run keeps options that it had by default and that have another
    default now; None where there are none."""
    changes = changed_options(options, recipe.method)
    if not any(option.is_default for option in changes):
        return None
    return f"--peft-kwargs {shlex.quote(in_one_line(keeping(changes, recipe.method)))}"


def in_one_line(values: Mapping[str, Any]) -> str:
    """Values as YAML in a line, such as "{variant: free}"."""
    return yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=math.inf).strip()


def compare(saved_recipe: Recipe, saved: Facts, recipe: Recipe, facts: Facts, same_base: bool) -> list[str]:
    """Compare the run of a state with the run about to continue it.

    `same_base` tells whether both build on the same base weights.

    Returns:
        One line for each change that makes the rest differ from an uninterrupted run.

    Raises:
        ResumeError: naming everything that makes the state unusable here. Changed data, readers and
            base weights count as notes where the recipe has `force`.
    """
    options, examples = options_of(saved_recipe, saved), recipe.task.examples
    problems = differences(saved_recipe, options, recipe, IDENTITY)
    problems += _other_outputs(saved.outputs, facts.outputs)
    doubts = _other_data(saved, facts, examples) + _other_readers(saved, facts)
    doubts += [] if same_base else ["the base weights are others"]
    if problems or (doubts and not recipe.run.force):
        flag = flag_for_defaults(options, recipe)
        own = "" if flag is None else f", and state options that have other defaults now ({flag})"
        advice = f"Resume with the run's own settings and data{own}, or start a new run in another folder"
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
    compared = {*IDENTITY, *HARMLESS, *OPTION_KEYS}
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
