"""Batches on their way to the device: order, reading ahead, errors, and runs that read ahead."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_weights, metrics, weights

from vimtune.data import CorruptImageError
from vimtune.recipe import load_recipe
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.job import Batch
from vimtune.training import InputError, Interrupted, train
from vimtune.training.prefetch import Readback, WindowReader
from vimtune.training.state import load_run_state
from vimtune.training.stepper import Stepper

CPU = torch.device("cpu")


def batch_of(images, labels) -> Batch:
    return Batch({"images": images, "labels": labels}, len(images))


class Loader:
    """Batches 0 to `length` - 1, each holding its number; fails in place of batch `bad`."""

    def __init__(self, length: int, bad: int = -1) -> None:
        self.length, self.bad = length, bad
        self.num_read = 0

    def __iter__(self):
        for number in range(self.length):
            if number == self.bad:
                raise CorruptImageError("picture.png", "damaged")
            self.num_read += 1
            yield batch_of(torch.full((2, 3), float(number)), torch.tensor([number, number]))


def reader(size: int, ahead: bool = True) -> WindowReader:
    made = WindowReader(CPU, size)
    made.ahead = ahead
    return made


def numbers(window) -> list[int]:
    for batch in window:
        images, labels = batch.tensors["images"], batch.tensors["labels"]
        assert images.unique().tolist() == labels.unique().tolist()
    return [int(batch.tensors["labels"][0]) for batch in window]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("size", "length"), [(1, 0), (1, 3), (2, 4), (3, 7), (5, 2)])
def test_windows_keep_the_order(ahead, size, length):
    windows, loader, seen = reader(size, ahead), Loader(length), []
    for window in windows.read(loader):
        given = len(seen) + len(window)
        assert loader.num_read == given
        for _ in range(2):  # one window, however often it is called
            assert windows.fetch_ahead() == (ahead and given < length)
        assert loader.num_read == (min(length, given + size) if ahead else given)
        seen += numbers(window)
    assert seen == list(range(length))
    assert not windows.fetch_ahead()  # the epoch is over
    assert loader.num_read == length


def test_a_new_epoch_forgets_what_was_fetched():
    windows, loader = reader(2), Loader(6)
    next(iter(windows.read(loader)))
    windows.fetch_ahead()
    assert [numbers(window) for window in windows.read(Loader(3))] == [[0, 1], [2]]
    assert loader.num_read == 4


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("bad", "given"), [(0, 0), (4, 4), (5, 4)])
def test_errors_come_with_their_window(ahead, bad, given):
    windows, seen = reader(2, ahead), []
    with pytest.raises(CorruptImageError, match=r"picture\.png"):
        for window in windows.read(Loader(8, bad)):
            seen += numbers(window)
            assert windows.fetch_ahead() == (ahead and len(seen) < given)
    assert seen == list(range(given))


def test_the_cpu_reads_nothing_ahead():
    windows, loader = WindowReader(CPU, 1), Loader(3)
    for count, _ in enumerate(windows.read(loader), 1):
        windows.fetch_ahead()
        assert loader.num_read == count


def test_numbers_come_back():
    assert Readback(torch.tensor([1.5, -2.0])).read() == [1.5, -2.0]


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(params=[False, True])
def late(request, reading_ahead, fused) -> bool:
    """Runs read ahead, and the numbers of a step at once or late."""
    reading_ahead()
    if request.param:
        fused()
    return request.param


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("changes", [{}, {"grad_accum": 3, "batch_size": 4, "num_workers": 1}], ids=str)
def test_reading_ahead_changes_nothing_nor_does_an_interruption(
    tiny, reading_ahead, fused, monkeypatch, changes, guards
):
    if guards:
        fused()
    whole = train(tiny("whole", **changes))
    reading_ahead()
    recipe, fetches, fetch = tiny("parts", **changes), [], WindowReader.fetch_ahead

    def fetch_and_stop(self):
        follows = fetch(self)  # the signal comes when the next window has been read
        fetches.append(self)
        if fetches.count(fetches[0]) == 5:  # evaluations read ahead as well, by readers of their own
            signal.raise_signal(signal.SIGINT)
        return follows

    with monkeypatch.context() as patch:
        patch.setattr(WindowReader, "fetch_ahead", fetch_and_stop)
        with pytest.raises(Interrupted):
            train(recipe)
    assert load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors")).progress.step == 6
    report = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(whole.run_dir), weights(report.run_dir))
    assert metrics(whole.run_dir) == metrics(report.run_dir)


@pytest.mark.usefixtures("no_pictures")
def test_numbers_are_read_when_the_next_passes_are_launched(tiny, late, monkeypatch):
    """Only within an epoch, and only where the optimizer looks for inf and NaN by itself."""
    order, compute, checked = [], Stepper._compute_gradients, Stepper._require_finite

    def note_compute(self, window):
        step = compute(self, window)
        order.append(("passes", step.number))
        return step

    def note_checked(self, step, epoch):
        order.append(("read", step.number))
        return checked(self, step, epoch)

    monkeypatch.setattr(Stepper, "_compute_gradients", note_compute)
    monkeypatch.setattr(Stepper, "_require_finite", note_checked)
    train(tiny(epochs=2))
    expected = []
    for first in (0, 4):
        for number in range(first, first + 4):
            expected.append(("passes", number))
            if late and number > first:
                expected.append(("read", number - 1))
            if not late or number == first + 3:
                expected.append(("read", number))
    assert order == expected


@pytest.fixture
def order(monkeypatch):
    """What is read, such as "train", and what is announced before, such as "ahead train"."""
    order, ahead, read = [], ImageBatches.read_ahead, ImageBatches.__iter__

    def note_ahead(self):
        order.append(f"ahead {self.split}")
        return ahead(self)

    def note_read(self):
        order.append(self.split)
        return read(self)

    monkeypatch.setattr(ImageBatches, "read_ahead", note_ahead)
    monkeypatch.setattr(ImageBatches, "__iter__", note_read)
    return order


@pytest.mark.usefixtures("no_pictures")
def test_what_is_read_next_is_announced_before_other_work(tiny, order):
    """The next epoch and the test images before an evaluation, and that one before training."""
    train(tiny(epochs=3, eval_interval=2, num_workers=1))
    assert order == [
        *["ahead train", "train"],
        *["ahead train", "ahead train", "ahead val", "train"],
        *["ahead train", "val", "ahead train", "ahead val", "train"],
        *["ahead test", "val", "test"],
    ]


@pytest.mark.usefixtures("no_pictures")
def test_the_evaluation_of_an_epoch_that_max_steps_ends_is_announced(tiny, order):
    train(tiny(epochs=3, eval_interval=3, max_steps=6))
    assert order == [
        *["ahead train", "train"],
        *["ahead train", "ahead train", "ahead val", "train"],
        *["ahead test", "val", "test"],
    ]


@pytest.mark.usefixtures("no_pictures")
def test_no_epoch_is_announced_after_the_last_one(tiny, order):
    """Its end is not that of the steps that all epochs have where `max_steps` had ended one of them early."""
    recipe = tiny("cut", epochs=2, max_steps=2)
    train(recipe)
    order.clear()
    train(load_recipe(None, {"resume": recipe.run.output_dir, "max_steps": 100}))
    assert order == ["ahead train", "ahead val", "train", "ahead test", "val", "test"]


@pytest.mark.usefixtures("no_pictures", "late")
@pytest.mark.parametrize(
    ("changes", "steps", "before"),
    [({}, 4, 3), ({"max_steps": 8}, 4, 3), ({"grad_accum": 3, "batch_size": 4}, 3, 1)],
    ids=["epochs", "steps", "an incomplete last window, whose end is seen earlier"],
)
def test_what_is_read_next_is_announced_while_a_device_works_on_the_last_step(
    tiny, monkeypatch, changes, steps, before
):
    """The next epoch, and after the last epoch the test images, before the numbers of the step are there."""
    order, ahead, checked = [], ImageBatches.read_ahead, Stepper._require_finite

    def note_ahead(self):
        order.append(f"ahead {self.split}")
        return ahead(self)

    def note_checked(self, step, epoch):
        order.append("numbers")
        return checked(self, step, epoch)

    monkeypatch.setattr(ImageBatches, "read_ahead", note_ahead)
    monkeypatch.setattr(Stepper, "_require_finite", note_checked)
    train(tiny(epochs=2, **changes))
    expected = []
    for split in ("train", "test"):
        numbers = ["numbers"] * steps
        numbers.insert(before, f"ahead {split}")
        expected += ["ahead train", "ahead val", *numbers]
    assert order == expected


@pytest.mark.usefixtures("no_pictures", "late")
def test_records_come_at_intervals_and_with_the_end_of_an_epoch(tiny):
    recipe = tiny(epochs=2, log_interval=3)
    train(recipe)
    steps = [record["step"] for record in metrics(recipe.run.output_dir) if record["kind"] == "step"]
    assert steps == [3, 4, 6, 8]


@pytest.mark.usefixtures("no_pictures", "late")
def test_a_step_without_any_image_updates_nothing(tiny, damaged):
    damaged(lambda index, turn: 9 <= turn <= 16)  # the second batch of 8
    recipe = tiny(epochs=1, on_corrupt="skip", weight_decay=0.1)
    assert train(recipe).warnings == ["train: 8 corrupt images left out"]
    records = [record for record in metrics(recipe.run.output_dir) if record["kind"] == "step"]
    assert [record["loss"] > 0 for record in records] == [True, False, True, True]
    state = load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors"))
    assert state.progress.step == 4
    assert {float(tensors["step"]) for tensors in state.optimizer.values()} == {3.0}


@pytest.mark.usefixtures("no_pictures", "late")
def test_a_corrupt_image_stops_the_run_at_its_step(tiny, damaged):
    def in_the_third_batch(index: int, turn: int) -> bool:
        return turn == 20

    damaged(in_the_third_batch)
    recipe = tiny()
    with pytest.raises(InputError, match="cannot decode image"):
        train(recipe)
    assert [record["step"] for record in metrics(recipe.run.output_dir)] == [1, 2]
    damaged(in_the_third_batch)  # which counts from the start again
    report = train(tiny("skipped", on_corrupt="skip", epochs=1))
    assert report.warnings == ["train: 1 corrupt image left out"]
    assert Path(report.run_dir, "report.json").exists()


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_windows_arrive_whole_while_the_device_works():
    device = torch.device("cuda", 0)
    length, side = 24, 1024
    images = [torch.full((16, 3, 256, 256), float(n)).pin_memory() for n in range(length)]
    batches = [batch_of(image, torch.tensor([n, n]).pin_memory()) for n, image in enumerate(images)]
    windows = WindowReader(device, 2)
    assert windows.ahead
    busy = torch.eye(side, device=device)
    seen, readings = [], []
    for window in windows.read(batches):
        for _ in range(20):
            busy = busy @ busy
        for batch in window:
            images, labels = batch.tensors["images"], batch.tensors["labels"]
            assert images.device == labels.device == device
            seen += [images.amin(), images.amax(), labels[0].float()]
        del images, labels, batch
        readings.append(Readback(torch.stack(seen)))
        windows.fetch_ahead()
    expected = [float(n) for n in range(length) for _ in range(3)]
    assert readings[-1].read() == expected
    assert readings[0].read() == expected[:6]
