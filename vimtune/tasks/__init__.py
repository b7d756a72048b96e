"""Tasks: what a model is trained for.

A new task is one file beside these with a class under `@register_task("name")`, and its name in the import
below. Importing this package does not import torch.
"""

from vimtune.tasks import classification  # noqa: F401  (registers itself)
from vimtune.tasks.base import TASKS, Task, register_task

__all__ = [
    "TASKS",
    "Task",
    "register_task",
]
