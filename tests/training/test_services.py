"""wandb, mlflow and trackio in their offline modes; each is left out where its package is not installed."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, logged_run, metrics

from vimtune.loggers import LOGGERS, Record, curves
from vimtune.loggers.notes import note_path, read_note
from vimtune.recipe import Recipe
from vimtune.training import Callback, Session, train

pytestmark = pytest.mark.usefixtures("no_pictures")

VARIABLES = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT")
"""What may be set where the tests run."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for MLflow, which takes seconds to make one: the tests share it."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing leaves the folder of a test."""
    for name in (*VARIABLES, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "services"
    home.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.chdir(tmp_path)
    return home


class Died(Exception):
    """What ends a run of these tests."""


class Die(Callback):
    """Ends a run after step 6, whose state is that of step 4."""

    def on_step(self, session: Session, step: Any) -> None:
        if step.step == 6:
            raise Died


def two_sessions(tmp_path: Path, logger: str, pause: float = 0.0) -> tuple[Path, list[Record]]:
    """A run of two epochs in two sessions with some seconds between them; its folder, and its records."""
    recipe = Recipe(**{**TINY, "epochs": 2, "output_dir": str(tmp_path / "my run"), "logger": logger})
    with pytest.raises(Died):
        train(recipe, callbacks=[Die()])
    time.sleep(pause)
    report = train(recipe.replace(resume="auto"))
    assert report.warnings == []
    return tmp_path / "my run", metrics(report.run_dir)


def points(records: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """The points of one curve."""
    return [(r["step"], found[name]) for r in records if name in (found := curves(r))]


CURVES = ("train/loss", "train/lr", "train/epoch_loss", "val/loss", "val/top1")


# --------------------------------------------------------------------------- wandb


def wandb_entries(content: bytes) -> Iterator[bytes]:
    """The entries of a file of wandb, which is a log of LevelDB behind 7 bytes.

    Blocks of 32 KiB have pieces behind a checksum (4 bytes), a length (2) and a kind (1): 1 for a whole
    entry, 4 for the last piece of one.
    """
    place, entry = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little for another piece
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def wandb_files(folder: Path) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """History and run of every offline run in a folder, in the order of time."""
    from wandb.proto.wandb_internal_pb2 import Record as Entry

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        rows, about = [], {}
        for data in wandb_entries(path.read_bytes()):
            entry = Entry()
            entry.ParseFromString(data)
            if entry.HasField("history"):
                items = entry.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            if entry.HasField("run"):
                about = {"id": entry.run.run_id, "project": entry.run.project, "name": entry.run.display_name}
            if entry.HasField("exit"):
                about["exit"] = entry.exit.exit_code
        yield rows, about


def test_wandb_offline(tmp_path) -> None:
    pytest.importorskip("wandb")
    # wandb names a session's folder by the second at which it began. One that begins in the same second
    # overwrites the file of the one before, which it contains.
    folder, records = two_sessions(tmp_path, "wandb", pause=1.0)
    (before, died), (rows, ended) = wandb_files(folder)
    assert died["id"] == ended["id"] and (died["exit"], ended["exit"]) == (1, 0)
    assert (ended["project"], ended["name"]) == ("vimtune", "my run")
    assert [row["_step"] for row in rows] == list(range(len(records)))
    for name in CURVES:
        expected = points(records, name)
        assert [(row["step"], row[name]) for row in rows if name in row] == expected
        found = [(row["step"], row[name]) for row in before if name in row]
        assert found == expected[: len(found)]


def test_wandb_leaves_other_runs_alone(tmp_path) -> None:
    wandb = pytest.importorskip("wandb")
    own = wandb.init(project="own", dir=str(tmp_path))
    logger = LOGGERS.get("wandb")()
    folder = tmp_path / "run"
    folder.mkdir()
    logger.open(logged_run(folder), 0)
    logger.close(None)
    own.log({"still": "open"})
    own.finish()


# --------------------------------------------------------------------------- mlflow


def test_mlflow_in_a_local_file(tmp_path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    folder, records = two_sessions(tmp_path, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name(tmp_path.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "my run"
    assert run.data.params["lr"] == "0.003" and "output_dir" not in run.data.params
    for name in CURVES:
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == points(records, name), name
    assert "final/test_top1" in run.data.metrics
    assert (note_path(folder, "mlflow")).read_text() == f"{run.info.run_id}\n"


def test_mlflow_tells_a_stopped_run_from_a_failed_one(tmp_path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    states = []
    for number, error in enumerate([KeyboardInterrupt(), ValueError()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        logger = LOGGERS.get("mlflow")()
        logger.open(logged_run(folder), 0)
        logger.close(error)
        states.append(MlflowClient().get_run((note_path(folder, "mlflow")).read_text().strip()).info.status)
    assert states == ["KILLED", "FAILED"]


def test_mlflow_begins_anew_where_the_server_does_not_know_the_run(tmp_path) -> None:
    pytest.importorskip("mlflow")
    unknown = f"{'a' * 32}\n"
    note_path(tmp_path, "mlflow").write_text(unknown)
    logger = LOGGERS.get("mlflow")()
    logger.open(logged_run(tmp_path), 0)
    logger.close(None)
    assert note_path(tmp_path, "mlflow").read_text() != unknown


# --------------------------------------------------------------------------- trackio


def test_trackio_on_this_computer(tmp_path, offline, monkeypatch) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio, __import__("trackio.utils", fromlist=["utils"])):
        monkeypatch.setattr(module, "TRACKIO_DIR", offline, raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", offline, raising=False)
    folder, records = two_sessions(tmp_path, "trackio")
    (name,) = SQLiteStorage.get_runs("vimtune")
    sign = (note_path(folder, "trackio")).read_text().strip()
    assert (name if isinstance(name, str) else name["name"]) == f"my run-{sign}"
    rows = SQLiteStorage.get_logs("vimtune", f"my run-{sign}")
    for curve in CURVES:
        found = [(row["step"], row[curve]) for row in rows if row.get(curve) is not None]
        assert found == points(records, curve), curve
    assert any("final/test_top1" in row for row in rows)


# --------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
@pytest.mark.parametrize("note", ["../../x\n", "a b\n", "", "x" * 300])
def test_a_note_of_another_form_is_none(tmp_path, name, note) -> None:
    """A run folder may come from somebody else; what stands there is compared with a pattern."""
    note_path(tmp_path, name).write_text(note)
    assert read_note(tmp_path, name, r"([a-z0-9]{1,64})\n") is None
