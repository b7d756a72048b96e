"""The plan of a comparison: what is compared, as flags and YAML files say it. Nothing here imports torch.

    methods:
      lora: {rank: 8}
      lora_in: {peft: lora, targets: in_proj}
      full: {lrs: [1.0e-4, 3.0e-4]}
    data: [flowers, cars]
    seeds: [0, 1, 2]
    data_seeds: [0, 1]
    lrs: [1.0e-3, 3.0e-3]
    model: vim_tiny_patch16_224
    epochs: 50

Keys that are not those of a plan are keys of the recipes of all its runs. What a data set says comes before
them, and what a method says before both. A grid of recipes (`vimtune.recipe.config_files`) is a plan, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vimtune import parsers
from vimtune.data.datasets import DATASETS, reads_files
from vimtune.fields import Options, Positive, option, options_of, parse_fields
from vimtune.files import atomic_write
from vimtune.methods import METHODS
from vimtune.recipe import Recipe, RecipeError, absolute_paths, keys_of, path_problems
from vimtune.recipe.config_files import read_plan
from vimtune.recipe.files import read_values
from vimtune.tasks import TASKS
from vimtune.text import quote, suggest

PLAN_FILE = "plan.yaml"
"""Name of the file in the folder of a comparison from which it can be continued."""


class PlanError(RecipeError):
    """A plan that cannot be carried out; `problems` lists every reason, one line each."""

    subject = "the plan"


Entries = dict[str, dict[str, Any]]
"""Methods or data sets by their name in the tables, with the keys of recipes that each sets."""

_NAME = re.compile(r"\w[\w.+-]{0,79}")
"""What a method or a data set may be called: it is part of the path of its runs."""

RESERVED = {
    "seed": "the key seeds",
    "output_dir": "the folder of the comparison",
    "resume": "the comparison, which continues what it finds",
    "force": "nothing: runs of a comparison have the data they began with",
}
"""Keys of recipes that the runs of a comparison do not take, and what sets them."""


def parse_entries(value: Any) -> Entries:
    """Methods or data sets: a list of names, or a mapping from names to keys of recipes.

    Raises:
        ValueError: something else.
    """
    value = parsers.plain(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
            raise ValueError("expected names, each of them once")
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(
            "expected names such as lora,full, or a mapping such as '{lora: {rank: 8}, full: {}}'"
        )
    for name, entry in value.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{quote(name)}: expected a name of letters, digits, '_', '-', '+' and '.'")
        if not isinstance(entry, dict | None):
            raise ValueError(f"{name}: {quote(entry)}: expected keys of recipes, such as {{rank: 8}}")
    return {name: entry or {} for name, entry in value.items()}


def _list_of(parse: parsers.Parser, what: str) -> parsers.Parser:
    """A list of different values that `parse` takes; one alone and text such as "1,2" are lists, too."""

    def parse_list(value: Any) -> list[Any]:
        value = parsers.plain(value)
        if isinstance(value, str):
            value = value.split(",")
        items = value if isinstance(value, list) else [value]
        try:
            parsed = [parse(item.strip() if isinstance(item, str) else item) for item in items]
        except ValueError as error:
            raise ValueError(f"expected {what}: {error}") from None
        if not parsed or len(set(parsed)) < len(parsed):
            raise ValueError(f"expected {what}, each of them once")
        return parsed

    return parse_list


def parse_published(value: Any) -> dict[str, dict[str, float]]:
    """Published scores by the names of a method and a data set.

    They may have names that a plan lacks, so that a part of a plan can be made with all of them.

    Raises:
        ValueError: something else.
    """
    value = parsers.plain(value)
    expected = "expected scores by method and data set, such as '{lora: {flowers: 87.3}}'"
    if not isinstance(value, dict) or not all(isinstance(own, dict) for own in value.values()):
        raise ValueError(expected)
    number = parsers.number()
    try:
        return {
            str(name): {str(data): number(score) for data, score in own.items()}
            for name, own in value.items()
        }
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None


_NAME_OF_ONE = parsers.optional(parsers.text)
_SEEDS = _list_of(parsers.integer(0, 2**63 - 1), "seeds such as 0,1,2")
_RATE = parsers.number(0, above=True)
_RATES = _list_of(_RATE, "learning rates such as 1e-3,3e-3")
_DEVICES = _list_of(parsers.device, "devices such as cuda:0,cuda:1")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """The keys of a plan beside those of recipes."""

    methods: dict[str, Any] | None = option(
        None, "names, or a mapping from names to keys of recipes", parse=parsers.optional(parse_entries)
    )
    data: dict[str, Any] | None = option(
        None, "data sets, as for methods (default: that of --dataset)", parse=parsers.optional(parse_entries)
    )
    seeds: list[int] = option([0], "seeds of the runs", parse=_SEEDS)
    lrs: list[float] | None = option(
        None, "learning rates of which the validation split chooses", parse=parsers.optional(_RATES)
    )
    lr_seeds: list[int] | None = option(
        None, "seeds of the runs that choose (default: the first)", parse=parsers.optional(_SEEDS)
    )
    data_seeds: list[int] | None = option(
        None, "seeds of the data (--data-seed), each with every seed", parse=parsers.optional(_SEEDS)
    )
    soups: bool = option(False, "also score the average of the adapters of all seeds")
    jobs: Positive = option(1, "runs at a time on each device")
    published: dict[str, dict[str, float]] | None = option(
        None,
        "scores that others have published, to stand beside ours: '{lora: {flowers: 87.3}}'",
        parse=parsers.optional(parse_published),
    )
    reference: str | None = option(
        None, "method with which the others are compared run by run (default: the first)", parse=_NAME_OF_ONE
    )
    devices: list[str] | None = option(
        None, "devices that share the runs: cuda:0,cuda:1", parse=parsers.optional(_DEVICES)
    )


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    """Name of the method in the plan."""
    data: str
    """Name of the data set in the plan."""
    lr: float
    """Its peak learning rate."""
    seed: int
    """Its seed."""
    data_seed: int | None = None
    """The seed of its data; None where the plan has no list of them."""

    @property
    def path(self) -> Path:
        """Its run folder within that of the comparison. What data seed 0 names is what recipes have without
        one, so that runs of a plan without data seeds are found by one with them."""
        of_data = f"-data{self.data_seed}" if self.data_seed else ""
        return Path("runs") / self.data / self.method / f"lr{self.lr!r}-seed{self.seed}{of_data}"

    def __str__(self) -> str:
        of_data = "" if self.data_seed is None else f", data seed {self.data_seed}"
        return f"{self.method} on {self.data}, lr {self.lr:g}, seed {self.seed}{of_data}"


@dataclass(frozen=True)
class Plan:
    """What is compared. `Plan.from_values` makes one and checks it."""

    options: PlanOptions
    """The keys of a plan."""
    base: Mapping[str, Any]
    """The keys of recipes that all runs have, as they were given."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any], *, check_paths: bool = True) -> Plan:
        """The plan of values of its keys, as YAML or flags give them; its paths become absolute.

        Args:
            values: the keys.
            check_paths: whether data and weights have to be there, which only runs need.

        Raises:
            PlanError: everything that is wrong with the plan and with the recipes of its runs.
        """
        own = options_of(PlanOptions)
        parsed, wrong = parse_fields(PlanOptions, values)
        problems = [*wrong.values()]
        if parsed.get("methods", ...) is None:
            problems.append(
                f"methods is missing: name what is compared, such as {','.join(list(METHODS)[:2])}"
            )
        base = {key: value for key, value in values.items() if key not in own}
        base, more = _without_wrong_keys(base, "", {"peft": "the key methods", **RESERVED}, list(own))
        problems += more
        for kind in ("methods", "data"):
            for name, entry in (parsed.get(kind) or {}).items():
                entry, more = _without_wrong_keys(entry, f"{kind}: {name}: ", RESERVED, ["lrs"])
                parsed[kind][name] = absolute_paths(entry)
                problems += more
        plan = cls(PlanOptions(**parsed), absolute_paths(base))
        problems += plan._name_problems()
        problems += [*plan._grid_problems()] or plan._recipe_problems(check_paths)
        if problems:
            raise PlanError(problems)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """All that the plan says; `Plan.from_values` makes it again of this."""
        own = {name: getattr(self.options, name) for name in options_of(PlanOptions)}
        return {**{name: value for name, value in own.items() if value is not None}, **self.base}

    def save(self, folder: Path) -> None:
        """Write the plan into the folder of its comparison, in one step."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        atomic_write(folder / PLAN_FILE, write)

    # --- what it consists of

    @cached_property
    def methods(self) -> Entries:
        """The methods with the keys that they set."""
        return {name: _with_method(entry, name) for name, entry in (self.options.methods or {}).items()}

    @cached_property
    def data(self) -> Entries:
        """The data sets with the keys that they set."""
        if self.options.data is None:
            given = next((key for key in _DATA_KINDS if key in self.base), "dataset")
            chosen = str(self.base.get(given, Recipe().data.dataset_name))
            return {chosen: {given: chosen}}
        entries = {}
        for name, entry in self.options.data.items():
            said = "dataset" in entry or "task" in entry
            meant = next((key for key, known in _DATA_KINDS.items() if name in known), None)
            entries[name] = entry if said or meant is None else {meant: name, **entry}
        return entries

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each method with each data set, all methods on the first data set first."""
        return [(method, data) for data in self.data for method in self.methods]

    @property
    def reference(self) -> str:
        """The method with which the others are compared run by run."""
        return self.options.reference or next(iter(self.methods))

    @property
    def published_elsewhere(self) -> list[str]:
        """Methods on data sets, "lora on flowers", that have published scores and no run here.

        A part of a plan has them, and so has a plan with a misspelt name.
        """
        stated, here = self.options.published or {}, set(self.pairs)
        pairs = [(method, data) for method, scores in stated.items() for data in scores]
        return [f"{method} on {data}" for method, data in pairs if (method, data) not in here]

    @property
    def lr_seeds(self) -> list[int]:
        """The seeds of the runs that choose the learning rate."""
        return self.options.lr_seeds or self.options.seeds[:1]

    @property
    def data_seeds(self) -> Sequence[int | None]:
        """The seeds of the data; one None where the plan has no list of them."""
        return self.options.data_seeds or [None]

    def cells(self, method: str, data: str, lr: float) -> list[Cell]:
        """The runs of a method on a data set with one learning rate: every seed with every data seed."""
        return [
            Cell(method, data, lr, seed, data_seed)
            for data_seed in self.data_seeds
            for seed in self.options.seeds
        ]

    def all_cells(self) -> Iterator[Cell]:
        """The runs of every method on every data set with each of its learning rates, though few of them are
        needed where several rates are tried."""
        for method, data in self.pairs:
            for lr in self.rates(method, data):
                yield from self.cells(method, data, lr)

    def choosing_cells(self, method: str, data: str, lr: float) -> list[Cell]:
        """Those of the runs by which learning rates are compared: they have the first data seed."""
        return [Cell(method, data, lr, seed, self.data_seeds[0]) for seed in self.lr_seeds]

    def rates(self, method: str, data: str) -> list[float]:
        """The learning rates that are tried with a method on a data set."""
        for values in (self.methods[method], self.data[data], {"lrs": self.options.lrs, **self.base}):
            if values.get("lrs") is not None:
                return list(_RATES(values["lrs"]))
            if values.get("lr") is not None:
                return [_RATE(values["lr"])]
        return [Recipe().optimisation.lr]

    def _shared_by(self, data: str) -> dict[str, Any]:
        """The keys that all runs have, for those on one data set: a folder of data is for the data sets that
        read files, where some of them do."""
        unread = [name for name, entry in self.data.items() if not reads_files(entry.get("dataset"))]
        left_out = ("data_dir",) if data in unread and len(unread) < len(self.data) else ()
        return {key: value for key, value in self.base.items() if key not in left_out}

    def recipe_values(self, cell: Cell) -> dict[str, Any]:
        """The keys of the recipe of a run as they were given, without its folder."""
        values = {**self._shared_by(cell.data), **self.data[cell.data], **self.methods[cell.method]}
        values.pop("lrs", None)
        if self.options.devices is not None:
            values["device"] = self.options.devices[0].partition(":")[0]
        of_data = {} if cell.data_seed is None else {"data_seed": cell.data_seed}
        return {**values, "lr": cell.lr, "seed": cell.seed, **of_data}

    def recipe(self, cell: Cell, folder: Path) -> Recipe:
        """The recipe of a run of the comparison in `folder`."""
        return Recipe.from_values({**self.recipe_values(cell), "output_dir": str(folder / cell.path)})

    # --- what may be wrong with it

    def _name_problems(self) -> Iterator[str]:
        """Methods and data sets whose name says nothing while their keys do not either."""
        for name, entry in self.methods.items():
            if "peft" not in entry:
                yield f"methods: {quote(name)} is no method, and has no key peft.{suggest(name, METHODS)}"
        if (reference := self.options.reference) is not None and reference not in self.methods:
            yield f"reference = {quote(reference)} is none of the methods.{suggest(reference, self.methods)}"
        if "dataset" in self.base or "task" in self.base:
            return
        for name, entry in self.data.items():
            if "dataset" not in entry and "task" not in entry:
                hint = suggest(name, [*DATASETS, *TASKS])
                yield f"data: {quote(name)} is no data set and no task, and has no key dataset or task.{hint}"

    def _grid_problems(self) -> Iterator[str]:
        """What the lists of seeds, learning rates and devices demand of each other and of other keys."""
        seeds, devices = self.options.seeds, self.options.devices or []
        for seed in self.lr_seeds:
            if seed not in seeds:
                yield f"lr_seeds: {seed} is not among the seeds {', '.join(map(str, seeds))}"
        if len({device.partition(":")[0] for device in devices}) > 1:
            yield f"devices = {quote(devices)}: expected devices of one kind, so that all runs compare"
        places = {"": {"lrs": self.options.lrs, **self.base}}
        for kind, entries in (("methods", self.methods), ("data", self.data)):
            places |= {f"{kind}: {name}: ": entry for name, entry in entries.items()}
        for where, entry in places.items():
            yield from _rate_problems(where, entry)
            if self.options.data_seeds is not None and "data_seed" in entry:
                yield f"{where}data_seed = {quote(entry['data_seed'])}: set by the key data_seeds"

    def _recipe_problems(self, check_paths: bool) -> Iterator[str]:
        """What is wrong with the recipes of the runs; what several of them share is said once."""
        found: dict[str, list[tuple[str, str]]] = {}
        for pair in self.pairs:
            for problem in dict.fromkeys(self._problems_of(*pair, check_paths)):
                found.setdefault(problem, []).append(pair)
        for problem, pairs in found.items():
            yield f"{self._whose(pairs)}{problem}"

    def _problems_of(self, method: str, data: str, check_paths: bool) -> Iterator[str]:
        rates = self.rates(method, data)
        for lr in rates:
            values = self.recipe_values(self.cells(method, data, lr)[0])
            try:
                recipe = Recipe.from_values(values)
            except RecipeError as error:
                yield from error.problems
                continue
            if check_paths:
                yield from path_problems(values)
            if len(rates) > 1 and recipe.data.selection_split == "test":
                yield (
                    "the test split would choose the learning rate (train_split, eval_split): give one "
                    "learning rate, or leave the validation split out of training"
                )

    def _whose(self, pairs: Iterable[tuple[str, str]]) -> str:
        """Before the problem of some pairs of a method and a data set: which they are."""
        pairs = list(pairs)
        methods, data = dict.fromkeys(pair[0] for pair in pairs), dict.fromkeys(pair[1] for pair in pairs)
        if len(pairs) == len(self.pairs):
            return ""
        if len(pairs) == len(methods) * len(self.data):
            return f"methods: {', '.join(methods)}: "
        if len(pairs) == len(data) * len(self.methods):
            return f"data: {', '.join(data)}: "
        return f"{', '.join(f'{method} on {name}' for method, name in pairs)}: "


_DATA_KINDS: Mapping[str, Any] = {"dataset": DATASETS, "task": TASKS}
"""The keys of a recipe that the name of a data set may stand for, with what is known under them."""


def _with_method(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of a method, whose name is its `peft` where that is a method or several joined by "+"."""
    is_method = all(part in METHODS for part in name.split("+"))
    return {"peft": name, **entry} if is_method else entry


def _without_wrong_keys(
    values: Mapping[str, Any], where: str, reserved: Mapping[str, str], of_plans: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Keys of recipes, without those that the recipes of no task have or that a comparison sets itself, and a
    line for each of these.

    Args:
        values: the keys with their values.
        where: where they stand, for messages.
        reserved: keys that are set otherwise, and by what.
        of_plans: keys that are allowed or may have been meant there besides those of recipes.
    """
    of_recipes = dict.fromkeys(key for task in TASKS for key in keys_of(task))
    right, problems = {}, []
    for key, value in values.items():
        if key in reserved:
            problems.append(f"{where}{key} = {quote(value)}: set by {reserved[key]}")
        elif key in of_recipes or key in of_plans:
            right[key] = value
        else:
            hint = suggest(str(key), [*of_plans, *(known for known in of_recipes if known not in reserved)])
            problems.append(f"{where}unknown key {quote(key)}.{hint}")
    return right, problems


def _rate_problems(where: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the learning rates that one place of a plan gives."""
    given = {key: values[key] for key in ("lr", "lrs") if values.get(key) is not None}
    for key, value in given.items():
        try:
            _RATES(value) if key == "lrs" else _RATE(value)
        except ValueError as error:
            yield f"{where}{key} = {quote(value)}: {error}"
    if len(given) == 2:
        yield f"{where}lr and lrs are given: lr is one learning rate, lrs are several to choose from"


def load_plan(
    config: str | os.PathLike[str] | None, values: Mapping[str, Any], *, check_paths: bool = True
) -> Plan:
    """The plan of a YAML file, if one is given, and of flags, which win over it; see `Plan.from_values`.

    Methods and data sets that flags give as names alone are those of the file where it has them, with all
    their keys there: they name a part of it.

    Raises:
        PlanError: the file or the values; it has every problem that was found.
    """
    try:
        stored = {} if config is None else read_values("config", config, read_plan)
    except RecipeError as error:
        raise PlanError(error.problems) from error
    together = {**stored, **values}
    for kind in ("methods", "data"):
        if stored.get(kind) is not None and values.get(kind) is not None:
            together[kind] = _of_file(stored[kind], values[kind])
    if "reference" in stored and "reference" not in values and "methods" in values:
        named = together["methods"]
        if isinstance(named, dict) and stored["reference"] not in named:
            del together["reference"]  # It is no method of this part.
    return Plan.from_values(together, check_paths=check_paths)


def _of_file(stored: Any, given: Any) -> Any:
    """What flags say about methods or data sets: names without keys take those that a file has for them.

    What cannot be read is given back, for whoever reports it.
    """
    try:
        of_file, named = parse_entries(stored), parse_entries(given)
    except ValueError:
        return given
    return {name: keys or of_file.get(name, {}) for name, keys in named.items()}
