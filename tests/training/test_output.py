"""Reports, pictures, metrics, and what happens when they cannot be written."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import largest_file
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_runs import TINY, metrics, weights

from vimtune.adapters import read_adapter_info
from vimtune.cli import main
from vimtune.console import build_console
from vimtune.recipe import Recipe, load_recipe
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.report import ImageReport
from vimtune.text import duration
from vimtune.training import OutputError, Report, train
from vimtune.training.identity import Facts
from vimtune.training.state import EpochRecord, Progress, RunState, load_run_state, save_run_state
from vimtune.training.tracking import Tracker


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(Recipe(**{**TINY, "output_dir": str(folder), "epochs": 2, "eval_interval": 2}))


def test_report_file_is_the_report(report):
    stored = json.loads(Path(report.run_dir, "report.json").read_text())
    assert stored == report.to_dict() == ImageReport(**stored).to_dict()


def test_report_tells_how_the_result_came_about(report):
    assert report.split == "test" and report.selection_split == "val"
    assert 0 <= report.top1 <= 100
    assert len(report.per_class) == report.num_classes == 5
    assert report.top5 is None  # five answers among five classes are always right
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
    assert set(report.versions) == {"vimtune", "python", "torch", "timm", "torchvision"}
    assert report.versions["torch"] == torch.__version__
    assert report.peak_memory > 50 and report.peak_memory_of == "process"
    assert report.images_per_second == pytest.approx(50 / report.train_seconds)
    assert report.recipe["peft"] == "lora" and report.format == "vimtune report 1"


def test_pictures(report):
    for name in ("learning_curve.png", "confusion_matrix.png"):
        data = Path(report.run_dir, name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_confusion_table_has_the_counts_of_the_report(report):
    with open(Path(report.run_dir, "confusion_matrix.csv"), newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    names = list(report.per_class)
    assert header == ["number", "true class", *names] and [row[1] for row in rows] == names
    counts = [[int(cell) for cell in row[2:]] for row in rows]
    assert sum(map(sum, counts)) == report.num_images
    assert sum(row[i] for i, row in enumerate(counts)) * 100 / report.num_images == report.top1
    for pair in report.most_confused:
        true, predicted = names.index(pair["true"]), names.index(pair["predicted"])
        assert (counts[true][predicted], sum(counts[true])) == (pair["images"], pair["of"])


def test_tensorboard_has_curves_by_split_and_the_settings(report):
    events = EventAccumulator(str(Path(report.run_dir, "tensorboard"))).Reload()
    tags = set(events.Tags()["scalars"])
    steps = {f"train/{name}" for name in ("loss", "lr", "grad_norm", "images_per_second")}
    final = {"final/test_top1", "final/test_loss", "final/best_val_top1"}
    assert tags == steps | {"train/epoch_loss", "val/loss", "val/top1"} | final
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("val/top1")] == [report.best_top1]
    assert events.Scalars("final/test_top1")[0].value == report.top1
    (start,) = (
        HParamsPluginData.FromString(content).session_start_info.hparams
        for tag, content in events.PluginTagToContent("hparams").items()
        if "session_start_info" in tag
    )
    assert start["lr"].number_value == 3e-3 and start["peft"].string_value == "lora"
    assert "output_dir" not in start and "num_workers" not in start


def test_metrics_say_which_split_was_evaluated(report):
    first, last = [record for record in metrics(report.run_dir) if record["kind"] == "epoch"]
    assert "split" not in first and last["split"] == "val"
    assert last.keys() >= {"epoch", "step", "lr", "train_loss", "loss", "top1", "top5"}


def test_durations():
    assert [duration(s) for s in (0, 59.6, 95, 3700)] == ["0:00", "1:00", "1:35", "1:01:40"]


EPOCH = EpochRecord(epoch=1, step=4, train_loss=1.0, lr=1e-3, rate=500.0)
SCORED = replace(EPOCH, loss=1.5, scores={"top1": 75.0, "top5": 90.0})


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """`on_terminal(width, action)`: what the terminal shows while and after `action(tracker)`."""

    def show(width: int, action: Callable[[Tracker], None]) -> tuple[str, list[str]]:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(width))
        console = build_console()
        assert console.is_terminal and console.width == width
        tracker = Tracker(console, Classification(), epochs=2, total_steps=8)
        action(tracker)
        tracker.close()
        raw = capsys.readouterr().out
        return raw, screen(raw)

    return show


def screen(raw: str) -> list[str]:
    """The lines that stay on a terminal to which `raw` was written by a transient bar of one line."""
    lines = [""]
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", raw):
        if piece == "\n":
            lines.append("")
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif piece == "\x1b[1A":
            lines.pop()
        elif piece and piece[0] not in "\x1b\r":
            lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()]


def test_progress_bar_on_a_terminal(on_terminal):
    def act(tracker):
        tracker.show_step(0, 3, 1.25, 1e-3, 512.0)
        tracker.show_epoch(EPOCH, "val")
        tracker.show_evaluation("test")
        tracker.message("the end")

    raw, left = on_terminal(100, act)
    assert "step 3/8" in raw and "loss 1.250" in raw and "512 img/s" in raw and "evaluating on test" in raw
    # The bar itself has gone: nothing stale stays above what follows, nor below a hint.
    assert [line.split("  ")[0] for line in left] == ["epoch 1/2", "the end"]


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80, 130])
def test_status_lines_fit_the_terminal(on_terminal, width):
    def act(tracker):
        tracker.show_step(0, 3, 1.25, 1e-3, 512.0)
        tracker.show_epoch(SCORED, "val")

    raw, left = on_terminal(width, act)
    (line,) = left
    assert len(line) <= width and line.startswith("epoch 1/2")
    assert set(line.split("  ")) <= {
        "epoch 1/2",
        "loss 1.0000",
        "val loss 1.5000",
        "val top1 75.00 %",
        "top5 90.00 %",
        "lr 1.0e-03",
        "500 img/s",
        f"eta {line.rsplit('eta ')[-1]}",
    }
    assert ("val top1 75.00 %" in line) == (width >= 30) and ("lr " in line) == (width == 130)
    assert ("\u2501" in raw) == (width >= 48)  # the bar


def test_other_processes_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    tracker = Tracker(build_console(True), Classification(), epochs=2, total_steps=8)
    tracker.message("hello")
    tracker.show_step(0, 3, 1.25, 1e-3, 512.0)
    tracker.close()
    assert capsys.readouterr().out == ""


def state_of(value: float, size: int) -> RunState:
    facts, tensors = Facts({}, 0, ""), {"w": torch.full((size,), value)}
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
    assert not list(Path(recipe.run.output_dir).glob(".*.vimtune-tmp"))
    assert load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors")).progress.epoch == 1
    resumed = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert (resumed.top1, resumed.loss) == (straight.top1, straight.loss)
    assert metrics(resumed.run_dir) == metrics(straight.run_dir)


def test_folder_that_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        train(tiny("file/run"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot make the folder .*run': Permission denied.*--output-dir"):
        train(tiny())


def test_a_repeated_warning_is_shown_and_recorded_once(capsys):
    kept = ["seen before the run was resumed"]
    tracker = Tracker(build_console(), Classification(), epochs=1, total_steps=1, warnings=kept)
    for text in ("seen before the run was resumed", "new", "new"):
        tracker.warn(text)
    tracker.close()
    assert kept == ["seen before the run was resumed", "new"]
    assert capsys.readouterr().out == "warning: new\n"


def test_a_run_over_folders_with_nasty_names_ends_well(tmp_path, capsys):
    names = ["a$b$_^{", "[red]", "ros\udce9"]
    for split, number in (("train", 4), ("val", 1), ("test", 1)):
        for shade, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (32, 32), (80 * shade, 40 * index, 0))
                image.save(tmp_path / "data" / split / name / f"{index}.png")
    folder = tmp_path / "run\u685c"
    options = {**TINY, "dataset": "folder", "data_dir": tmp_path / "data", "epochs": 1, "output_dir": folder}
    del options["dataset_kwargs"], options["pretrained"]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    assert main(["train", "--no-pretrained", *flags]) == 0
    shown = ["a$b$_^{", "[red]", r"ros\udce9"]
    assert set(json.loads((folder / "report.json").read_text())["per_class"]) == set(shown)
    assert (folder / "confusion_matrix.png").exists() and f"run folder: {folder}" in capsys.readouterr().out

    # What was read from the folders is what comes out of the files: the run goes on, and its adapter answers.
    assert main(["train", "--resume", str(folder), "--epochs", "2"]) == 0
    assert json.loads((folder / "report.json").read_text())["epochs"] == 2
    assert main(["predict", str(tmp_path / "data" / "test"), "--adapter", str(folder)]) == 0
    assert r"ros\udce9" in capsys.readouterr().out


def test_a_run_folder_whose_name_is_not_utf8(tmp_path, capsys):
    folder = tmp_path / "caf\udce9"
    report = train(Recipe(**{**TINY, "epochs": 1, "output_dir": str(folder)}))
    assert report.epochs == 1 and read_adapter_info(folder / "adapter.safetensors").extra["epoch"] == 1
    assert main(["train", "--resume", str(folder), "--epochs", "2"]) == 0
    assert f"run folder: {tmp_path}/caf\\udce9" in capsys.readouterr().out
    assert load_run_state(folder / "checkpoint.safetensors").progress.epoch == 2
