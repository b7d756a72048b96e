"""What the runs of a comparison have found, put together over all seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vimtune.fields import options_of
from vimtune.methods import method_names
from vimtune.recipe import OPTION_KEYS, Recipe
from vimtune.schema import check
from vimtune.tasks import Score
from vimtune.training.identity import HARMLESS
from vimtune.training.result import Result

INCIDENTAL = frozenset(
    (
        *HARMLESS,
        "seed",
        "data_seed",
        "device",
        "threads",
        "backend",
        "deterministic",
        "eval_interval",
        "compile",
        "shard",
    )
)
"""Keys of recipes by which two runs are not told apart in tables: seeds, places and ways to compute."""


@dataclass(frozen=True)
class Spread:
    """A number over several runs: seeds, and seeds of the data."""

    mean: float
    """Their mean."""
    deviation: float | None
    """Their standard deviation (n - 1); None for one run."""
    count: int
    """How many there are."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of numbers; None if one of them is missing, or there are none."""
        known = list(values)
        if not known or any(value is None for value in known):
            return None
        numbers = [float(value) for value in known if value is not None]
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.mean(numbers), deviation, len(numbers))

    def show(self, digits: int = 1) -> str:
        """Mean and deviation, as "81.3 ± 0.4"."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """A method on a data set: its runs with the learning rate that was chosen."""

    method: str
    """Name of the method."""
    data: str
    """Name of the data set."""
    results: tuple[Result, ...]
    """The finished runs, by data seed and seed."""
    lr: float | None
    """The learning rate; None where it is not known yet."""
    missing: int = 0
    """How many runs are not finished."""
    tried: int = 1
    """Among how many learning rates the validation split has chosen."""
    published: float | None = None
    """The most important score as somebody else has published it, where the plan says so."""
    others: tuple[Result, ...] = ()
    """The finished runs with learning rates that were not chosen, or not yet."""
    soups: tuple[Mapping[str, float | None], ...] = ()
    """Scores of the averages of the adapters of all seeds, for each data seed, where the plan asks for it."""

    @property
    def seeds(self) -> list[int]:
        """Those of the runs, each once."""
        return list(dict.fromkeys(result.seed for result in self.results))

    @property
    def data_seeds(self) -> list[int | None]:
        """Those of the runs, each once."""
        return list(dict.fromkeys(result.data_seed for result in self.results))

    @property
    def has_a_run_per_seed(self) -> bool:
        """Whether the number of runs is that of the seeds: not with several data seeds, and not where a run
        was made twice."""
        return len(self.results) == len(self.seeds) and len(self.data_seeds) < 2

    @property
    def data_differ(self) -> bool:
        """Whether runs with different data seeds had different data, by what their reports say of these."""
        used = {result.data_seed: tuple(result.report.data.values()) for result in self.results}
        return len(used) < 2 or len(set(used.values())) > 1

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that the task has, the most important one first; the loss where it has none."""
        loss = Score("loss", "loss", percent=False, higher_is_better=False)
        return (*self.results[0].recipe.task.scores, loss) if self.results else (loss,)

    @property
    def split(self) -> str:
        """The split of the scores."""
        return self.results[0].report.split if self.results else ""

    def spread(self, of: Callable[[Result], float | None]) -> Spread | None:
        """A number of each run, over all of them."""
        return Spread.of(of(result) for result in self.results)

    def score_named(self, name: str) -> Spread | None:
        """A score that the data have; None where a run lacks it."""
        return self.spread(lambda result: result.scores.get(name))

    @property
    def score(self) -> Spread | None:
        """The most important score that the data have."""
        return self.score_named(self.scores[0].name)

    @property
    def soup(self) -> Spread | None:
        """The most important score of the averages over seeds."""
        return Spread.of(scores.get(self.scores[0].name) for scores in self.soups)

    @property
    def parameters(self) -> int | None:
        """How many numbers are trained beside the head."""
        return self.results[0].method_parameters if self.results else None

    @property
    def size(self) -> str:
        """What a budget has chosen, such as "rank=8"; empty where there was none."""
        if not self.results or self.results[0].recipe.method.budget is None:
            return ""
        method, config = self.results[0].recipe.method, self.results[0].report.method_config
        values = {
            name: f"{option}={_short(check(dict[str, Any], config.get(name), name).get(option))}"
            for name, option in method.sized_by_budget.items()
        }
        return next(iter(values.values())) if len(values) == 1 else ", ".join(map(" ".join, values.items()))

    @property
    def trainable(self) -> int | None:
        """How many numbers are trained, head included."""
        return self.results[0].report.trainable_parameters if self.results else None


def rows_of_runs(results: Sequence[Result]) -> list[Row]:
    """The rows of runs that no plan knows: runs that differ in nothing but seed and data seed are one row.

    Rows are called by the method and the data set, and by the settings in which others of the same name
    differ.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(_settings(result), sort_keys=True), []).append(result)
    firsts = [group[0] for group in groups.values()]
    recipes = [first.recipe for first in firsts]
    data = _names(
        [recipe.data.dataset_name or recipe.task.name for recipe in recipes], list(map(_data_keys, recipes))
    )
    methods = _names([recipe.method.peft for recipe in recipes], list(map(_method_keys, firsts)))
    return [
        Row(method, name, tuple(sorted(group, key=lambda run: (run.data_seed or 0, run.seed))), group[0].lr)
        for method, name, group in zip(methods, data, groups.values(), strict=True)
    ]


def _settings(result: Result) -> dict[str, Any]:
    """What tells a run apart: its recipe, with all options of its methods in the place of those that were
    given, because versions may differ in their defaults."""
    left_out = INCIDENTAL | OPTION_KEYS
    recipe = {name: value for name, value in result.recipe.to_dict().items() if name not in left_out}
    names = method_names(result.recipe.method.peft)
    options = {name: check(dict[str, Any], result.report.method_config.get(name), name) for name in names}
    if len(names) == 1:
        return {**recipe, "options": options[names[0]]}
    return {
        **recipe,
        "options": {f"{key} of {name}": own for name in names for key, own in options[name].items()},
    }


def _data_keys(recipe: Recipe) -> dict[str, Any]:
    """What data and model of a recipe are."""
    names = [*options_of(type(recipe.data)), *options_of(type(recipe.backbone)), "task"]
    return {
        name: value for name, value in recipe.to_dict().items() if name in names and name not in INCIDENTAL
    }


def _method_keys(result: Result) -> dict[str, Any]:
    """All else that tells runs apart."""
    data = _data_keys(result.recipe)
    return {name: value for name, value in _settings(result).items() if name not in data}


def _names(titles: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each title, with the settings in which those of the same title differ."""
    names = []
    for title, own in zip(titles, settings, strict=True):
        alike = [_flat(other) for name, other in zip(titles, settings, strict=True) if name == title]
        flat = _flat(own)
        keys = [key for key in flat if any(other.get(key) != flat[key] for other in alike)]
        details = ", ".join(f"{key}={_short(flat[key])}" for key in keys)
        names.append(f"{title} ({details})" if details else title)
    return names


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, with the entries of those that are mappings in their place."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {str(inner): own for inner, own in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    return (
        f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def score_label(score: Score, split: str) -> str:
    """What an axis or a column of scores is called."""
    return f"{score.title} ({split}){', %' if score.percent else ''}"


def by_data(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the name of their data set."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.data, []).append(row)
    return groups


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The rows of a data set with the best mean score; none where fewer than two have one, or they are not
    of one split."""
    scored = [(row.score.mean, row) for row in rows if row.score is not None]
    if len(scored) < 2 or len({row.split for _, row in scored}) > 1:
        return []
    better = max if scored[0][1].scores[0].higher_is_better else min
    best = better(mean for mean, _ in scored)
    return [row for mean, row in scored if mean == best]
