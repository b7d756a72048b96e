"""Tasks: what a model is trained for.

A new task is one file beside these with a class under `@register_task("name")`, and its name in the import
below. Importing this package does not import torch.
"""

from vimtune.tasks import classification, multilabel, texts  # noqa: F401  (they register themselves)
from vimtune.tasks.base import TASKS, Score, Task, register_task
from vimtune.tasks.components import BackboneOptions, DataOptions, EvaluateOptions, PredictOptions
from vimtune.tasks.details import Details
from vimtune.tasks.job import Batch, Evaluation, Forward, Job, Loader, Outcome, Scoring, Tally, Tensors, Trial
from vimtune.tasks.predictor import Predictor

__all__ = [
    "TASKS",
    "BackboneOptions",
    "Batch",
    "DataOptions",
    "Details",
    "EvaluateOptions",
    "Evaluation",
    "Forward",
    "Job",
    "Loader",
    "Outcome",
    "PredictOptions",
    "Predictor",
    "Score",
    "Scoring",
    "Tally",
    "Task",
    "Tensors",
    "Trial",
    "register_task",
]
