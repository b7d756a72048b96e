"""Loggers: what they write, how a run that goes on continues it, and what becomes of one that fails."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from full_disk import largest_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import logged_run, metrics

from vimtune.loggers import LOGGERS, LoggedRun, Logger, Record, curves, parse_loggers, register_logger
from vimtune.recipe import Recipe, RecipeError
from vimtune.training import Callback, EpochRecord, OutputError, Session, train
from vimtune.training.logs import Logs, compared_settings

STEP = {"step": 1, "epoch": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 3.0, "images_per_second": 8.0}
EPOCH = {"step": 1, "epoch": 1, "lr": 0.1, "train_loss": 2.0, "images_per_second": 8.0}
SCORES = {"split": "val", "loss": 1.5, "top1": 50.0, "top5": None}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {**STEP, "step": number, "loss": loss}


class Disconnected(Exception):
    """A callback of a test has ended the run."""


class Disconnect(Callback):
    """Ends a run after a step, as if its process had died."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, session: Session, step: Any) -> None:
        if step.step == self.step:
            raise Disconnected


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(LOGGERS, "_things", dict(LOGGERS._things))


@pytest.fixture
def service(registered: None) -> type[Logger]:
    """A registered logger "service", whose list `told` outlives it as a service does."""

    @register_logger("service")
    class Service(Logger):
        """Keeps the records in memory."""

        summary = "records in memory"
        told: ClassVar[list[tuple[int, str]]] = []
        fails_at: ClassVar[list[str]] = []
        ends: ClassVar[list[Any]] = []

        def _do(self, what: str) -> None:
            if what in self.fails_at:
                raise ConnectionError("no route\nto host")

        def open(self, run: LoggedRun, known: int) -> int:
            self._do("open")
            return len(self.told)

        def write(self, record: Record) -> None:
            self._do(f"step {record['step']}")
            self.told.append((record["step"], record["kind"]))

        def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:
            self._do("result")
            self.ends.append(dict(scores))

        def close(self, error: BaseException | None) -> None:
            self._do("close")
            self.ends.append(type(error).__name__)

    return Service


def open_logs(folder: Path, *names: str, **session: int) -> Logs:
    logs = Logs(lambda text: pytest.fail(text))
    logs.open(names, logged_run(folder, **session))
    return logs


def tensorboard(folder: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tensorboard,csv", ["tensorboard", "csv"]),
        ([" csv "], ["csv"]),
        ("none", []),
        (None, []),
        ([], []),
        ("jsonl", ["jsonl"]),
    ],
)
def test_loggers_are_named_in_a_recipe(given, expected) -> None:
    recipe = Recipe(logger=given)
    assert recipe.run.logger == expected == parse_loggers(given)
    assert Recipe.from_values(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", "expected a known logger: .*Did you mean 'tensorboard'"),
        ("csv,csv", "every logger once"),
        ([3], "expected a known logger"),
        ({"csv": 1}, "expected names of loggers .csv, jsonl, mlflow"),
    ],
)
def test_wrong_names_are_refused(given, message) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(logger=given)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_missing_package_is_said_before_anything_begins(tiny, monkeypatch, name) -> None:
    monkeypatch.setattr("vimtune.loggers.registry.find_spec", lambda module: None)
    with pytest.raises(
        ValueError, match=rf"logger {name} needs {name}, .*pip install {name}, or leave"
    ) as error:
        train(tiny(logger=f"csv,{name}"))
    assert "\n" not in str(error.value) and not Path(tiny().run.output_dir).exists()


def test_no_package_of_a_logger_is_imported_unasked() -> None:
    code = "import sys, vimtune; vimtune.Recipe(logger='wandb,csv'); vimtune.loggers.list_loggers();"
    code += "print([n for n in ('torch', 'tensorboard', 'wandb', 'mlflow', 'trackio') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_what_loggers_are_told_of_the_settings_names_no_folder(tmp_path) -> None:
    folder = str(tmp_path / "secret")
    recipe = Recipe(dataset="folder", data_dir=folder, checkpoint=f"{folder}/my.pth", output_dir=folder)
    settings = compared_settings(recipe)
    assert settings["checkpoint"] == "my.pth" and settings["lr"] == 1e-3 and "seed" in settings
    assert folder not in json.dumps(settings) and not {"logger", "data_dir", "output_dir"} & set(settings)


# --------------------------------------------------------------------------- records


def test_records_as_points_of_curves() -> None:
    assert curves({"kind": "step", **STEP}) == {
        "train/loss": 2.5,
        "train/lr": 0.1,
        "train/grad_norm": 3.0,
        "train/images_per_second": 8.0,
    }
    assert curves({"kind": "epoch", **EPOCH}) == {"train/epoch_loss": 2.0}
    assert curves({"kind": "epoch", **EPOCH, **SCORES}) == {
        "train/epoch_loss": 2.0,
        "val/loss": 1.5,
        "val/top1": 50.0,
    }
    late = {"kind": "evaluation", "step": 1, "epoch": 1, **SCORES}
    assert curves(late) == {"val/loss": 1.5, "val/top1": 50.0}


def test_all_curves_are_known_before_the_first_record(tmp_path) -> None:
    scores = {"loss": 1.5, "top1": 50.0, "top5": 80.0, "split": "val"}
    found = curves({"kind": "step", **STEP}) | curves({"kind": "epoch", **EPOCH, **scores})
    assert set(logged_run(tmp_path).curves) == set(found)


def test_numbers_that_are_not_finite_are_null_and_no_points(tmp_path) -> None:
    logs = open_logs(tmp_path, "csv", "tensorboard")
    logs.write("step", {**STEP, "grad_norm": float("inf"), "loss": float("nan")})
    logs.close()
    (record,) = metrics(tmp_path)
    assert record["grad_norm"] is None and record["loss"] is None
    (row,) = table(tmp_path)
    assert row["train/loss"] == row["train/grad_norm"] == "" and row["train/lr"] == "0.1"
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"] == [
        "train/lr",
        "train/images_per_second",
    ]


def test_a_table_has_a_column_for_each_curve(tmp_path) -> None:
    logs = open_logs(tmp_path, "csv")
    logs.write("step", STEP)
    logs.write("epoch", {**EPOCH, **SCORES})
    logs.close()
    first, second = table(tmp_path)
    assert {name: value for name, value in first.items() if value} == {
        "step": "1",
        "epoch": "1",
        "train/loss": "2.5",
        "train/lr": "0.1",
        "train/grad_norm": "3.0",
        "train/images_per_second": "8.0",
    }
    assert {name: value for name, value in second.items() if value} == {
        "step": "1",
        "epoch": "1",
        "train/epoch_loss": "2.0",
        "val/loss": "1.5",
        "val/top1": "50.0",
    }


def test_full_disk_leaves_no_half_line(tmp_path) -> None:
    logs = open_logs(tmp_path)
    logs.write("step", step(1))
    length = logs.sync()
    with largest_file(length + 20), pytest.raises(OutputError, match=r"metrics\.jsonl: File too large"):
        logs.write("step", step(2))
    logs.write("step", step(3))
    logs.close()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 3]


def test_full_disk_ends_the_events_where_it_is_met(tmp_path, capfd) -> None:
    logger = LOGGERS.get("tensorboard")()
    logger.open(logged_run(tmp_path), 0)
    logger.write({"kind": "step", **step(1)})
    with largest_file(400), pytest.raises(OutputError, match=r"cannot write .*tensorboard: File too large"):
        for number in range(2, 9):
            logger.write({"kind": "step", **step(number)})
    logger.write({"kind": "step", **step(9)})
    logger.close(None)
    values = tensorboard(tmp_path)
    assert values[0][0] == 1 and values[-1][0] == 9 and len(values) < 9
    assert "Traceback" not in capfd.readouterr().err


# --------------------------------------------------------------------------- going on


def test_a_session_that_goes_on_drops_what_it_writes_again(tmp_path) -> None:
    """Six steps of which the state knows three, then five more."""
    first = open_logs(tmp_path, "csv", "tensorboard")
    for number in range(1, 4):
        first.write("step", step(number, 0.0))
    kept = first.sync()
    for number in range(4, 7):
        first.write("step", step(number, 0.0))
    first.close()
    second = open_logs(tmp_path, "csv", "tensorboard", first_step=3, kept_bytes=kept)
    for number in range(4, 9):
        second.write("step", step(number, 3.0))
    second.close()
    expected = [*((number, 0.0) for number in (1, 2, 3)), *((number, 3.0) for number in range(4, 9))]
    assert tensorboard(tmp_path) == expected
    assert [(int(row["step"]), float(row["train/loss"])) for row in table(tmp_path)] == expected
    assert [(record["step"], record["loss"]) for record in metrics(tmp_path)] == expected


def test_a_logger_that_was_not_there_in_every_session_has_all_steps(tmp_path) -> None:
    kept, steps = 0, 0
    for names in (["tensorboard"], ["csv"], ["tensorboard", "csv"]):
        logs = open_logs(tmp_path, *names, first_step=steps, kept_bytes=kept)
        logs.write("step", step(steps + 1))
        logs.write("step", step(steps + 2))
        kept, steps = logs.sync(), steps + 2
        logs.write("step", step(steps + 1, 9.0))  # of which the state does not know
        logs.close()
    expected = [(number, 1.0) for number in range(1, 7)]
    assert tensorboard(tmp_path)[:6] == expected
    assert [(int(row["step"]), float(row["train/loss"])) for row in table(tmp_path)][:6] == expected


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"kind": "step", "step": 1}',
        '{"kind": "x", "step": 1, "epoch": 1}',
        '{"kind": "step", "step": 1, "epoch": 1, "loss": "text"}',
        '{"kind": "step", "step": 1, "epoch": 1, "loss": {"a": 1}}',
        '{"kind": "step", "step": -1, "epoch": 1}',
    ],
)
def test_damaged_records_are_named_where_they_are_needed(tmp_path, line) -> None:
    logs = open_logs(tmp_path)
    logs.write("step", step(1))
    logs.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        open_logs(tmp_path, "csv", kept_bytes=path.stat().st_size)
    open_logs(tmp_path, kept_bytes=path.stat().st_size).close()


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_run_goes_on_with_the_same_records(tiny, service) -> None:
    """The service has records of which the state does not know: they are neither lost nor doubled."""
    recipe = tiny(epochs=2, logger="service,csv", eval_interval=2)
    with pytest.raises(Disconnected):
        train(recipe, callbacks=[Disconnect(7)])
    assert service.told[-1] == (6, "step") and service.ends == ["Disconnected"]
    train(recipe.replace(resume="auto"))
    told = [(record["step"], record["kind"]) for record in metrics(recipe.run.output_dir)]
    assert service.told == told
    assert [int(row["step"]) for row in table(Path(recipe.run.output_dir))] == [number for number, _ in told]
    assert set(service.ends[1]) >= {"final/test_top1", "final/test_loss", "final/best_val_top1"}
    assert service.ends[2:] == ["NoneType"]


@pytest.mark.usefixtures("no_pictures")
def test_other_loggers_may_continue_a_run_without_a_word(tiny, service) -> None:
    with pytest.raises(Disconnected):
        train(tiny(epochs=2, logger="none"), callbacks=[Disconnect(6)])
    folder = Path(tiny().run.output_dir)
    assert not (folder / "tensorboard").exists()
    report = train(tiny(epochs=2, logger="service", resume="auto"))
    assert report.warnings == []
    assert service.told == [(record["step"], record["kind"]) for record in metrics(folder)]


# --------------------------------------------------------------------------- failures


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("when", ["step 2", "result", "close"])
def test_a_service_that_fails_is_a_warning_of_the_report(tiny, service, when, capsys) -> None:
    service.fails_at.append(when)
    report = train(tiny(epochs=1, logger="service"))
    (warning,) = report.warnings
    assert warning.startswith(
        "logger service failed and is told nothing more (ConnectionError: no route to host)"
    )
    assert json.loads(Path(report.run_dir, "report.json").read_text())["warnings"] == [warning]
    assert f"warning: {warning}" in capsys.readouterr().out
    assert len(metrics(report.run_dir)) == 5


@pytest.mark.usefixtures("no_pictures")
def test_a_service_that_cannot_be_opened_ends_the_run_before_it_begins(tiny, service) -> None:
    service.fails_at.append("open")
    expected = (
        r"logger service cannot be opened \(ConnectionError: no route to host\): .*leave it out of --logger"
    )
    with pytest.raises(ValueError, match=expected):
        train(tiny(epochs=1, logger="service"))
    assert metrics(tiny().run.output_dir) == []


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_service_is_brought_up_to_date_when_the_run_goes_on(tiny, service) -> None:
    class Stop(Callback):
        def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
            raise Disconnected

    service.fails_at.append("step 2")
    with pytest.raises(Disconnected):
        train(tiny(epochs=2, logger="service"), callbacks=[Stop()])
    assert service.told == [(1, "step")]
    service.fails_at.clear()
    report = train(tiny(epochs=2, logger="service", resume="auto"))
    assert service.told == [(record["step"], record["kind"]) for record in metrics(report.run_dir)]
