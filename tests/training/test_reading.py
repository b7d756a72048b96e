"""Images that cannot be read end the run with its state saved; a run on no image at all is an error."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_weights, metrics, weights

from vimtune.cli import main
from vimtune.data import CorruptImageError, ImageReadError, TooManyCorruptError
from vimtune.data.synthetic import SyntheticFlowers
from vimtune.recipe import load_recipe
from vimtune.tasks.images.batches import ImageBatches
from vimtune.training import InputError, train
from vimtune.training.state import load_run_state

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")


def gone(dataset, index):
    raise ImageReadError("disk/picture.png", "Input/output error")


def dead(dataset, index):
    os.kill(os.getpid(), signal.SIGKILL)


def refused(dataset, index):
    raise OSError(24, "Too many open files")


FAULTS = {
    "gone": (gone, 0, r"cannot read disk/picture\.png: Input/output error"),
    "gone in a worker": (gone, 1, r"cannot read disk/picture\.png: Input/output error"),
    "refused": (refused, 0, "Too many open files"),
    "refused in a worker": (refused, 1, "Too many open files"),
    "dead worker": (dead, 1, "the processes that prepare images failed"),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    from tiny_runs import TINY

    from vimtune.recipe import Recipe

    return train(
        Recipe(**{**TINY, "epochs": 2, "output_dir": str(tmp_path_factory.mktemp("straight") / "run")})
    )


@pytest.mark.parametrize(
    ("fault", "split"),
    [
        ("gone", "train"),
        ("refused", "test"),
        ("gone in a worker", "val"),
        ("refused in a worker", "train"),
        ("dead worker", "train"),
    ],
)
def test_a_fault_of_the_system_ends_the_run_with_its_state_saved(tiny, straight, monkeypatch, fault, split):
    """`on_corrupt = skip` is no answer to it; when it is mended, the run goes on as if it had not been."""
    break_it, workers, expected = FAULTS[fault]
    others = set(multiprocessing.active_children())
    load = SyntheticFlowers.load
    # Image 0 of the training images comes up in step 3 of the first epoch.
    recipe = tiny(epochs=2, num_workers=workers, on_corrupt="skip")
    with monkeypatch.context() as patch:
        patch.setattr(
            SyntheticFlowers,
            "load",
            lambda dataset, index: (break_it if (dataset.split, index) == (split, 0) else load)(
                dataset, index
            ),
        )
        with pytest.raises(InputError, match=expected) as error:
            train(recipe)
    text, _, command = str(error.value).partition("\n")
    assert "the state is saved, continue with:" in text
    assert command.strip() == f"vimtune train --resume {recipe.run.output_dir}"
    done = load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors")).progress.step
    if fault == "dead worker":  # it takes with it what it had prepared already
        assert done <= 2
    else:
        assert done == {"train": 2, "val": 4, "test": 8}[split]
    assert set(multiprocessing.active_children()) <= others  # or the end of Python would wait for them
    report = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))
    assert metrics(recipe.run.output_dir) == metrics(straight.run_dir)
    assert (report.top1, report.warnings) == (straight.top1, [])


def test_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticFlowers, "load", gone)
    tiny(epochs=1).save(tmp_path / "recipe.yaml")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read disk/picture.png") and "Traceback" not in error


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "25 of the 25 images of 'train' .* are corrupt"),
        ("val", "10 of the 10 images of 'val' .* are corrupt"),
        ("test", "10 of the 10 images of 'test' .* are corrupt"),
    ],
)
def test_a_run_on_no_image_is_an_error(tiny, monkeypatch, split, expected):
    load = SyntheticFlowers.load

    def corrupt(dataset, index):
        if dataset.split == split:
            raise CorruptImageError(dataset.describe(index), "damaged")
        return load(dataset, index)

    monkeypatch.setattr(SyntheticFlowers, "load", corrupt)
    recipe = tiny(epochs=1, on_corrupt="skip")
    with pytest.raises(TooManyCorruptError, match=expected):
        train(recipe)
    assert not Path(recipe.run.output_dir, "report.json").exists()


class FakeLoader:
    """In the place of an `ImageLoader`: yields `batches`."""

    def __init__(self, batches):
        self.dataset = type("Images", (), {"split": "train", "source": "", "__len__": lambda self: 1})()
        self.batches = batches

    def unfinished(self):
        return self.batches

    def finish(self, images):
        return images


def test_faults_of_the_program_are_not_taken_for_those_of_the_data():
    def batches(error):
        yield {"images": torch.zeros(1)}, torch.zeros(1), np.zeros(1)
        raise error

    for error in (
        ValueError("no image"),
        RuntimeError("shape mismatch"),
        TypeError("an argument"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)):
            list(ImageBatches(FakeLoader(batches(error))))
    trace = "Caught OSError in DataLoader worker process 0.\nTraceback ...\nOSError: [Errno 5] bad disk\n"
    with pytest.raises(InputError, match=r"^OSError: \[Errno 5\] bad disk$"):
        list(ImageBatches(FakeLoader(batches(OSError(trace)))))
