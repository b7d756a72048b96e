"""The training run: `train(recipe)` does everything and returns a `Report`."""

from vimtune.output import OutputError
from vimtune.training.evaluate import evaluate
from vimtune.training.guard import NonFiniteError
from vimtune.training.inputs import InputError
from vimtune.training.interrupt import Interrupted
from vimtune.training.report import Report, ScoreReport
from vimtune.training.trainer import train

__all__ = [
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "Report",
    "ScoreReport",
    "evaluate",
    "train",
]
