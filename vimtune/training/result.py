"""A finished run as others read it: its recipe and its report, from the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimtune.recipe import Recipe, complete_stored
from vimtune.run_folder import RunFolder
from vimtune.schema import check, load_json, parse_json
from vimtune.tasks.report import Report
from vimtune.text import quote


@dataclass(frozen=True)
class Result:
    """What one finished run has found."""

    recipe: Recipe
    """Its settings."""
    report: Report
    """Its report, as the file has it."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.recipe.run.seed

    @property
    def data_seed(self) -> int | None:
        """The seed of its data; None for a task whose recipes have none."""
        return getattr(self.recipe.data, "data_seed", None)

    @property
    def lr(self) -> float:
        """Its peak learning rate."""
        return self.recipe.optimisation.lr

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores on the split of the result, and the loss."""
        return {**self.report.scores_by_name(), "loss": self.report.loss}

    @property
    def rank(self) -> tuple[float, ...]:
        """How good the kept epoch is on the selection split, by which learning rates are compared.

        Raises:
            ValueError: the report says nothing of that epoch.
        """
        values = self.selected
        return self.recipe.task.rank(check(float, values.pop("loss"), f"the loss of {self._kept}"), values)

    @property
    def selected(self) -> dict[str, float | None]:
        """The scores of the kept epoch on the selection split, and the loss; None for what the report does
        not say.

        Raises:
            ValueError: it says something else there.
        """
        history, number = self.report.history, self.report.best_epoch
        record = next((record for record in history if record.get("epoch") == number), {})
        values = check(dict[str, float | None], record, self._kept)
        return {name: values.get(name) for name in (*(s.name for s in self.recipe.task.scores), "loss")}

    @property
    def _kept(self) -> str:
        """The kept epoch in messages."""
        return f"epoch {self.report.best_epoch} in the history of {quote(self.report.run_dir)}"

    @property
    def had_a_choice(self) -> bool:
        """Whether several epochs were evaluated, of which the best is kept."""
        return sum(record.get("loss") is not None for record in self.report.history) > 1

    def curve(self, score: str) -> list[tuple[float, float]]:
        """A score on the selection split as it rose: for every epoch that was evaluated the share of epochs
        that are over then, and the score.

        Raises:
            ValueError: the history in the report has another form.
        """
        what = f"the history of {quote(self.report.run_dir)}"
        evaluated = [record for record in self.report.history if record.get(score) is not None]
        return [
            (check(int, record.get("epoch"), what) / self.report.epochs, check(float, record[score], what))
            for record in evaluated
        ]

    @property
    def method_parameters(self) -> int | None:
        """How many numbers are trained beside the head; None in reports of earlier versions."""
        head = self.report.head_parameters
        return None if head is None else self.report.trainable_parameters - head


def read_result(folder: Path) -> Result:
    """The result in a run folder.

    Raises:
        ValueError: there is none, or none that can be read; the message says which folder and why.
    """
    path = RunFolder(folder).report
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{quote(str(folder))} has no {path.name}: it is no run folder, or the run is not finished"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{quote(str(path))} cannot be read: {error}") from error
    what = quote(str(path))
    values = check(dict[str, Any], parse_json(text, what), what)
    stored = check(dict[str, Any], values.get("recipe"), f"{what}: the recipe")
    try:
        recipe = Recipe.from_values(complete_stored(stored))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return Result(recipe, load_json(recipe.task.report_type(), text, what))
