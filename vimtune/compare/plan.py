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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vimtune.compare.plan_keys import Entries, PlanOptions, parse_entries, parse_rate, parse_rates, read_keys
from vimtune.compare.plan_problems import problems_of
from vimtune.data.datasets import DATASETS, reads_files
from vimtune.fields import options_of
from vimtune.files import atomic_write_text
from vimtune.methods import METHODS
from vimtune.recipe import Recipe, RecipeError
from vimtune.recipe.config_files import read_plan
from vimtune.recipe.files import read_values
from vimtune.tasks import TASKS

PLAN_FILE = "plan.yaml"
"""Name of the file in the folder of a comparison from which it can be continued."""

_DATA_KINDS: Mapping[str, Any] = {"dataset": DATASETS, "task": TASKS}
"""The keys of a recipe that the name of a data set may stand for, with what is known under them."""


class PlanError(RecipeError):
    """A plan that cannot be carried out; `problems` lists every reason, one line each."""

    subject = "the plan"


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
        options, base, problems = read_keys(values)
        plan = cls(options, base)
        problems += problems_of(plan, check_paths)
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
        atomic_write_text(folder / PLAN_FILE, text)

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
                return list(parse_rates(values["lrs"]))
            if values.get("lr") is not None:
                return [parse_rate(values["lr"])]
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


def _with_method(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of a method, whose name is its `peft` where that is a method or several joined by "+"."""
    is_method = all(part in METHODS for part in name.split("+"))
    return {"peft": name, **entry} if is_method else entry


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
