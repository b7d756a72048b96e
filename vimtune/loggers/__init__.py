"""Loggers: where the records of a run go, by choice (`--logger`).

A logger is one file beside these with a class under `@register_logger("name")`, and its name in the import
below. Importing this package imports neither torch nor the package of any logger.
"""

from vimtune.loggers import csv, jsonl, mlflow, tensorboard, trackio, wandb  # noqa: F401  (they register)
from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.registry import LOGGERS, list_loggers, parse_loggers, register_logger, require_installed

__all__ = [
    "LOGGERS",
    "LoggedRun",
    "Logger",
    "Record",
    "curves",
    "list_loggers",
    "parse_loggers",
    "register_logger",
    "require_installed",
]
