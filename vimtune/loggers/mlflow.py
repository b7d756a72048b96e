"""MLflow's tracking."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.notes import read_note, write_note
from vimtune.loggers.registry import register_logger
from vimtune.loggers.seen import Seen

PARAMETER_LENGTH = 500
"""Characters of a parameter that every server takes."""
BATCH = 100
"""Parameters that a server takes at once."""


@register_logger("mlflow")
class MLflow(Logger):
    """A run of MLflow, called like the run folder, in the experiment "vimtune" or `MLFLOW_EXPERIMENT_NAME`.

    Where it is kept says `MLFLOW_TRACKING_URI`, and without it MLflow's own default: a file mlflow.db in the
    working directory, which `mlflow ui` shows.
    """

    summary = "MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are respected"
    module = package = "mlflow"

    _client: Any
    _run_id: str
    _seen: Seen

    def open(self, run: LoggedRun, known: int) -> int:
        """Begin a run of MLflow, or go on with the one that the run folder names.

        It is told of all records and finds out by itself which points there are already.
        """
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        found = self._find(run)
        if found is None:
            self._begin(run)
            self._seen = Seen({})
            return 0
        self._run_id = found
        self._client.update_run(found, status="RUNNING")
        last = {}
        for name in run.curves:
            points = self._client.get_metric_history(found, _allowed(name))
            if points:
                last[name] = max(point.step for point in points)
        self._seen = Seen(last)
        return 0

    def write(self, record: Record) -> None:
        """Add a point to each curve."""
        self._write_points(self._seen.new(curves(record), record["step"]), record["step"])

    def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:
        """Add the scores as metrics, which the table of runs shows."""
        self._write_points(scores, step)

    def close(self, error: BaseException | None) -> None:
        """End the run of MLflow: finished, stopped by the user, or failed."""
        stopped = isinstance(error, KeyboardInterrupt)
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        self._client.set_terminated(self._run_id, status=status)

    def _find(self, run: LoggedRun) -> str | None:
        """The run of MLflow that the folder names; None where this server does not have it."""
        from mlflow.exceptions import MlflowException

        note = read_note(run.folder, "mlflow", r"([a-z0-9]{1,64})\n")
        if note is None:
            return None
        try:
            info = self._client.get_run(note[1]).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return note[1] if info.lifecycle_stage == "active" else None

    def _begin(self, run: LoggedRun) -> None:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vimtune"
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self._run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in run.settings.items()]
        for first in range(0, len(parameters), BATCH):
            self._client.log_batch(self._run_id, params=parameters[first : first + BATCH])
        write_note(run.folder, "mlflow", f"{self._run_id}\n")

    def _write_points(self, points: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if points:
            metrics = [Metric(_allowed(name), value, now, step) for name, value in points.items()]
            self._client.log_batch(self._run_id, metrics=metrics)


def _allowed(name: str) -> str:
    """The name of a curve in signs that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
