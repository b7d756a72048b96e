"""Where the folder of a run cannot be made: the message says which one, why, and how another one is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vimtune import cli, output, run_folder

SMALL = ["--model", "test_vim", "--no-pretrained", "--epochs", "1"]
COMMANDS = {
    "train": ["train", *SMALL],
    "the first try": ["train"],
    "compare": ["compare", "--methods", "lora,linear", *SMALL],
    "search": ["search", "--space", "mambapeft", "--dataset", "synthetic_flowers", *SMALL],
}
"""Commands that make a folder in `runs/` of the working directory."""


@pytest.fixture
def failure(tmp_path, monkeypatch, capsys):
    """The message of a command that fails in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *more: str) -> str:
        assert cli.main([*COMMANDS[command], *more]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and "--resume" not in captured.err
        return captured.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_runs(tmp_path, failure, command):
    (tmp_path / "runs").touch()
    error = failure(command)
    assert "cannot make the folder 'runs" in error and "runs' is not a folder." in error
    assert "Name one elsewhere with --output-dir" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_working_directory_that_is_not_writable(tmp_path, failure, command, monkeypatch):
    # The superuser may write anywhere, so the system's answers are made up here.
    access, mkdir = os.access, Path.mkdir

    def below(path):
        return Path(path).absolute().is_relative_to(tmp_path)

    def refuse(self, *arguments, **options):
        if below(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: not below(path) and access(path, mode))
    monkeypatch.setattr(Path, "mkdir", refuse)
    error = failure(command)
    assert "cannot make the folder 'runs" in error and f"{str(tmp_path)!r} is not writable." in error
    assert "Name one elsewhere with --output-dir" in error


@pytest.mark.parametrize("command", ["compare", "search"])
@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 300, "File name too long"), ("loop/mine", "symbolic links")]
)
def test_a_name_that_the_system_does_not_take(tmp_path, failure, command, name, reason):
    """Looking for the reason failed as making the folder had, and that was taken for a fault of ours."""
    (tmp_path / "loop").symlink_to("loop")
    error = failure(command, "--output-dir", name)
    assert "cannot make the folder" in error and reason in error and "with --output-dir" in error


def test_what_cannot_be_told_before(tmp_path, monkeypatch):
    """A full disk, say, shows when the folder is made."""

    def refuse(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for make in (run_folder.create_unused, run_folder.make_folder):
        with pytest.raises(
            output.OutputError, match=r"cannot make the folder .*: No space left on device\. Name"
        ):
            make(tmp_path / "runs" / "mine")


def test_training_finds_out_before_it_reads_anything(tmp_path, failure, monkeypatch):
    """It read the data and made the model first."""
    from vimtune.tasks.classification import Classification

    monkeypatch.setattr(Classification, "open", lambda *given: pytest.fail("the data were opened"))
    (tmp_path / "runs").touch()
    assert "cannot make the folder" in failure("train")
    assert "output_dir = 'runs/mine': " in failure("train", "--output-dir", "runs/mine")


def test_a_report_beside_an_adapter_that_may_only_be_read(tmp_path, monkeypatch, capsys):
    from adapter_files import make_adapter

    make_adapter(tmp_path / "adapter.safetensors", rank=2)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main(["analyze", str(tmp_path)]) == 2
    assert "is not a writable folder; choose another --output" in capsys.readouterr().err
