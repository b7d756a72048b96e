"""The training run: `train(recipe)` does everything and returns a `Report`.

What records and draws a run is imported when a run begins: whoever predicts needs other parts of this room,
such as the choice of the device, and does without the libraries for plots and event logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune.files import OutputError
from vimtune.late_names import late_names
from vimtune.tasks.job import InputError
from vimtune.training.evaluate import evaluate  # not late, because its module has the same name
from vimtune.training.guard import NonFiniteError
from vimtune.training.interrupt import Interrupted

if TYPE_CHECKING:
    from vimtune.tasks.report import Report, ScoreReport
    from vimtune.training.callbacks import Callback, Session, StepRecord
    from vimtune.training.state import EpochRecord
    from vimtune.training.trainer import train

__all__ = [
    "Callback",
    "EpochRecord",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "Report",
    "ScoreReport",
    "Session",
    "StepRecord",
    "evaluate",
    "train",
]

_HOMES = {
    "vimtune.training.callbacks": ("Callback", "Session", "StepRecord"),
    "vimtune.tasks.report": ("Report", "ScoreReport"),
    "vimtune.training.state": ("EpochRecord",),
    "vimtune.training.trainer": ("train",),
}
"""Modules that define the names that come late."""

__getattr__, __dir__ = late_names(__name__, _HOMES)
