"""Reports, pictures, metrics, and what happens when they cannot be written."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, metrics, weights

from vimtune.recipe import Recipe, load_recipe
from vimtune.train import OutputError, Report, train
from vimtune.train.checkpoint import Progress, RunState, load_run_state, save_run_state
from vimtune.train.folder import RunFolder
from vimtune.train.identity import Facts
from vimtune.train.report import draw_confusion_matrix, draw_learning_curve
from vimtune.train.tracking import MetricsLog, Tracker, build_console, duration


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(Recipe(**{**TINY, "output_dir": str(folder), "epochs": 2, "eval_interval": 2}))


def test_report_file_is_the_report(report):
    stored = json.loads(Path(report.run_dir, "report.json").read_text())
    assert stored == report.to_dict() == Report(**stored).to_dict()


def test_report_tells_how_the_result_came_about(report):
    assert report.split == "test" and report.selection_split == "val"
    assert 0 <= report.top1 <= report.top5 <= 100
    assert list(report.per_class) == [*report.per_class] and len(report.per_class) == report.num_classes == 5
    # Two test images of each class.
    assert report.num_images == 10 and set(report.per_class.values()) <= {0.0, 50.0, 100.0}
    assert report.top1 == pytest.approx(sum(report.per_class.values()) / 5)
    assert (report.epochs, report.steps, report.best_epoch) == (2, 8, 2)
    assert report.best_top1 == report.last_top1 == report.history[-1]["top1"]
    assert "top1" not in report.history[0]  # eval_interval = 2
    assert report.trainable_parameters == sum(t.numel() for t in weights(report.run_dir).values())
    assert report.trainable_parameters < report.total_parameters
    assert (
        report.method_config["lora"]
        == {"rank": 2, "alpha": 8.0, "dropout": 0.0} | report.method_config["lora"]
    )
    assert report.data.keys() == {"train", "val", "test"} and "25 images" in report.data["train"]
    assert (report.backend, report.device, report.processes, report.threads) == ("torch", "cpu", 1, 1)
    assert report.versions["torch"] == torch.__version__
    assert report.peak_memory > 50 and report.peak_memory_of == "process"
    assert report.images_per_second == pytest.approx(50 / report.train_seconds)


def test_pictures(report):
    for name in ("learning_curve.png", "confusion_matrix.png"):
        data = Path(report.run_dir, name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_learning_curve_shows_the_history(report):
    losses, accuracy = draw_learning_curve(report).axes
    train_loss, val_loss = losses.get_lines()
    assert train_loss.get_ydata().tolist() == [record["train_loss"] for record in report.history]
    assert (val_loss.get_xdata().tolist(), accuracy.get_lines()[0].get_ydata().tolist()) == (
        [2],
        [report.best_top1],
    )


@pytest.mark.parametrize("classes", [2, 30, 102])
def test_confusion_matrix_shows_shares(report, classes):
    confusion = torch.diag(torch.arange(classes)) * 3
    axes = draw_confusion_matrix(confusion, [f"class {i}" for i in range(classes)], report).axes[0]
    shown = axes.get_images()[0].get_array()
    assert shown[0, 0] == 0 and shown[1, 1] == 1  # a class without images, and one all right
    assert len(axes.get_xticklabels()) == classes if classes <= 30 else len(axes.get_xticklabels()) < 20


def test_durations():
    assert [duration(s) for s in (0, 59.6, 95, 3700)] == ["0:00", "1:00", "1:35", "1:01:40"]


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = build_console()
    assert console.is_terminal
    tracker = Tracker(RunFolder(tmp_path), console, is_main=True, epochs=2, total_steps=8)
    tracker.show_step(0, 3, 1.25, 1e-3, 512.0)
    tracker.record_epoch(
        {"epoch": 1, "step": 4, "train_loss": 1.0, "lr": 1e-3, "images_per_second": 500.0}, "val"
    )
    tracker.close()
    text = capsys.readouterr().out
    assert "epoch 1/2" in text and "loss 1.250" in text and "512 img/s" in text and "eta" in text


def test_other_processes_are_silent(tmp_path, capsys):
    tracker = Tracker(RunFolder(tmp_path), build_console(False), is_main=False, epochs=2, total_steps=8)
    tracker.message("hello")
    tracker.record_step({"step": 1, "loss": 1.0})
    assert tracker.sync() == 0
    tracker.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state_of(value: float, size: int) -> RunState:
    facts, tensors = Facts([], 0, ""), {"w": torch.full((size,), value)}
    return RunState(Recipe(), facts, Progress(step=int(value)), tensors, {}, {}, {})


def test_full_disk_keeps_the_former_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_run_state(path, state_of(1.0, 100))
    with (
        largest_file(10_000),
        pytest.raises(OutputError, match=r"cannot write .*: File too large.*free some space"),
    ):
        save_run_state(path, state_of(2.0, 10_000))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    state = load_run_state(path)
    assert state.progress.step == 1 and torch.equal(state.adapter["w"], torch.ones(100))


def test_full_disk_leaves_no_half_line(tmp_path):
    log = MetricsLog(RunFolder(tmp_path))
    log.write({"step": 1})
    with largest_file(20), pytest.raises(OutputError):
        log.write({"step": 2, "text": "x" * 100})
    log.write({"step": 3})
    log.close()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 3]


@pytest.mark.usefixtures("no_pictures")
def test_run_on_a_full_disk_can_be_resumed(tiny, monkeypatch):
    straight = train(tiny("straight"))
    recipe = tiny("full")
    write_bytes, calls = Path.write_bytes, []

    def full(self, data):
        if self.name.startswith(".checkpoint"):
            calls.append(1)
            if len(calls) == 2:
                write_bytes(self, data[: len(data) // 2])
                raise OSError(28, "No space left on device", str(self))
        return write_bytes(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"checkpoint\.safetensors: No space left on device.*--resume"):
            train(recipe)
    assert not list(Path(recipe.output_dir).glob(".*.vimtune-tmp"))
    assert load_run_state(Path(recipe.output_dir, "checkpoint.safetensors")).progress.epoch == 1
    resumed = train(load_recipe(None, {"resume": recipe.output_dir}))
    assert (resumed.top1, resumed.loss) == (straight.top1, straight.loss)
    assert metrics(resumed.run_dir) == metrics(straight.run_dir)


def test_folder_that_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        train(tiny("file/run"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*run: Permission denied.*permissions"):
        train(tiny())
