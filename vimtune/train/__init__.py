"""The training run: `train(recipe)` does everything and returns a `Report`."""

from vimtune.train.evaluate import Evaluation, evaluate, iterate_logits
from vimtune.train.folder import OutputError
from vimtune.train.guard import NonFiniteError
from vimtune.train.interrupt import Interrupted
from vimtune.train.reading import InputError
from vimtune.train.report import Report
from vimtune.train.trainer import train

__all__ = [
    "Evaluation",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "Report",
    "evaluate",
    "iterate_logits",
    "train",
]
