"""Whether the folders and files that a recipe names can be used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vimtune import parsers
from vimtune.run_folder import ADAPTER_FILE, obstacle, what_a_folder_is
from vimtune.tasks import TASKS
from vimtune.text import quote

RUN_FILES = ("recipe.yaml", "report.json", "metrics.jsonl", ADAPTER_FILE, "checkpoint.safetensors")
"""Files by which a folder is known to hold a run."""


def path_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems with the folders and files a recipe names, found before any heavy work.

    What is read must exist; `output_dir` must be writable and, unless the run is resumed, must not hold the
    results of another run. With several processes, call it before the first of them writes.
    """
    problems = []
    for name, check in _CHECKS.items():
        try:
            path = parsers.optional(parsers.path)(values.get(name))
            problem = None if path is None else check(Path(path), values)
        except ValueError:
            continue  # no path at all: the field's own parser says it
        except OSError as error:  # a name too long, a folder that may not be searched
            problem = f": {error.strerror}"
        if problem is not None:
            problems.append(f"{name} = {quote(path)}{problem}")
    return problems


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a recipe with the folders and files that they name made independent of the working directory.

    What is no path stays as it is: the field's own parser says what is wrong with it.
    """
    result = dict(values)
    for name in _CHECKS.keys() & values.keys():
        with suppress(ValueError):
            result[name] = parsers.optional(parsers.absolute_path)(values[name])
    return result


def _data_dir_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    may_come = values.get("download", True) and not path.exists()
    return None if path.is_dir() or may_come else " is not a folder"


def _file_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    return None if path.is_file() else " is not a file"


def _presence_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    return None if path.exists() else " does not exist"


def _beginning_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    """A run that goes on needs no longer what it began with."""
    if values.get("resume") is not None:
        return None
    if path.is_dir():
        return None if (path / ADAPTER_FILE).is_file() else f": {what_a_folder_is(path)}"
    return _file_problem(path, values) if path.exists() else " does not exist"


def _checkpoint_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    task = values.get("task")
    if (
        isinstance(task, str)
        and task in TASKS
        and TASKS.get(task).backbone_options.weights_in_folders
        and path.is_dir()
    ):
        return None
    return _file_problem(path, values)


def _output_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    reason = obstacle(path)
    if reason is not None:
        return f": {reason}"
    if values.get("resume") is None and any((path / name).exists() for name in RUN_FILES):
        return f" holds another run: choose another folder, or continue that run with --resume {path}"
    return None


_CHECKS = {
    "data_dir": _data_dir_problem,
    "train_file": _file_problem,
    "val_file": _file_problem,
    "test_file": _file_problem,
    "checkpoint": _checkpoint_problem,
    "teacher": _presence_problem,
    "init_adapter": _beginning_problem,
    "output_dir": _output_problem,
}
"""Keys that name a folder or a file, each with what is asked of it."""
