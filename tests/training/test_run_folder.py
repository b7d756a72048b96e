"""One run at a time works in a folder, and it removes nothing but what is its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from vimtune import run_folder as folder
from vimtune.recipe import load_recipe
from vimtune.run_folder import FolderInUseError, RunFolder, create_unused, hold, writing
from vimtune.tasks.classification import Classification
from vimtune.training import OutputError, run, train

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(folder, "LOCK_PATIENCE", 0)


def test_a_new_folder_is_nobody_elses(tmp_path):
    """As when two runs are started in the same second: both saw that the name was free."""
    found = [create_unused(tmp_path / "runs" / "name") for _ in range(3)]
    assert [path.name for path in found] == ["name", "name-2", "name-3"]
    (tmp_path / "file").touch()
    assert create_unused(tmp_path / "file").name == "file-2"


@pytest.mark.parametrize("place", ["run", "run/report.json"])
def test_what_cannot_be_written_is_told_with_the_folder_to_continue_in(place, tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / place
    with pytest.raises(OutputError) as error, writing(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    assert f"cannot write {path}: No space left on device" in str(error.value)
    assert f"free some space, then continue with --resume {tmp_path / 'run'} if" in str(error.value)


def test_the_second_run_in_a_folder_is_told_who_is_there(tiny, monkeypatch):
    """The second starts while the first trains: with its output_dir, with --resume, with --resume auto."""
    recipe = tiny(epochs=1)
    follow, refusals = run.Run._train_epoch, []

    def while_it_trains(this):
        if not refusals:
            for second in (
                recipe,
                load_recipe(None, {"resume": recipe.run.output_dir}),
                load_recipe(None, {**recipe.to_dict(), "resume": "auto"}),
            ):
                with pytest.raises(ValueError) as error:
                    train(second)
                refusals.append(error.value)
        follow(this)

    monkeypatch.setattr(run.Run, "_train_epoch", while_it_trains)
    train(recipe)
    assert "holds another run" in str(refusals[0])
    for refusal in refusals[1:]:
        assert isinstance(refusal, FolderInUseError) and "\n" not in str(refusal)
        assert f"is in use by process {os.getpid()} on " in str(refusal)


def test_two_runs_that_both_found_the_folder_free(tiny, monkeypatch):
    """Both checked the folder before either of them wrote there; one of them trains."""
    recipe = tiny(epochs=1)
    build, errors = Classification.open, []

    def meanwhile(*arguments):
        if not errors:
            errors.append(None)
            train(recipe)
        return build(*arguments)

    monkeypatch.setattr(Classification, "open", meanwhile)
    with pytest.raises(ValueError, match="holds another run"):
        train(recipe)
    assert json.loads(Path(recipe.run.output_dir, "report.json").read_text())["epochs"] == 1


HOLDER = """
import sys, time
from pathlib import Path
from vimtune.run_folder import RunFolder, hold
with hold(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(FolderInUseError, match=rf"is in use by process {process.pid} on .* since \d"),
            hold(RunFolder(tmp_path)),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with hold(RunFolder(tmp_path)):
        assert f"process {os.getpid()} " in RunFolder(tmp_path).holder.read_text()


def test_a_lock_that_is_kept_a_moment_longer_is_waited_for(tmp_path, monkeypatch):
    """By data workers of a killed run, which hold it until they miss their parent."""
    monkeypatch.setattr(folder, "LOCK_PATIENCE", 20)
    other = FileLock(tmp_path / ".lock", thread_local=False)
    other.acquire()
    released = []
    monkeypatch.setattr(time, "sleep", lambda seconds: released or released.append(other.release()))
    with hold(RunFolder(tmp_path)):
        assert released


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog, number):
    def refuse(lock, timeout):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with hold(RunFolder(tmp_path)):
        pass
    assert "has no locks: make sure that no other run uses this folder" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    def refuse(lock, timeout):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match="Read-only file system") as error, hold(RunFolder(tmp_path)):
        pass
    assert "\n" not in str(error.value)


def test_hidden_files_of_the_user_stay(tiny):
    recipe = tiny(epochs=1)
    path = Path(recipe.run.output_dir)
    path.mkdir()
    own = [".notes.tmp", ".checkpoint.safetensors.backup.tmp", "x.tmp"]
    for name in own:
        (path / name).write_text("mine")
    (path / ".recipe.yaml.abc123.vimtune-tmp").touch()
    train(recipe)
    assert all((path / name).read_text() == "mine" for name in own)
    assert not list(path.glob(".*.vimtune-tmp"))
