"""The training run: `train(recipe)` does everything and returns a `Report`."""

from vimtune.output import OutputError
from vimtune.train.evaluate import evaluate
from vimtune.train.guard import NonFiniteError
from vimtune.train.inputs import InputError
from vimtune.train.interrupt import Interrupted
from vimtune.train.report import Report, ScoreReport
from vimtune.train.trainer import train

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
