"""The number of processes that prepare images, on machines of all sizes."""

from __future__ import annotations

import pytest
from PIL import Image

from vimtune.data import CorruptImageError, ImageDataset, build_transform
from vimtune.data.loading import worker_count
from vimtune.data.loading.samples import TransformedSamples
from vimtune.data.loading.worker_count import choose_num_workers

TRANSFORM = build_transform("none", (64, 64))
BATCH = 3 * 3 * 64 * 64
"""Bytes for each image of the batches that wait."""


class Pictures(ImageDataset):
    """So many pictures of one colour; `bad` of them cannot be read."""

    name, classes, split, source = "pictures", ["a"], "train", "pictures"

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.targets, self.bad = [0] * count, bad
        self.asked: list[int] = []

    def load(self, index: int) -> Image.Image:
        self.asked.append(index)
        if index in self.bad:
            raise CorruptImageError(str(index), "damaged")
        return Image.new("RGB", (64, 64))

    def describe(self, index: int) -> str:
        return str(index)


def samples(dataset: ImageDataset) -> TransformedSamples:
    return TransformedSamples(dataset, TRANSFORM, 0)


@pytest.fixture
def on(monkeypatch):
    """`on(cores, ms=..., count=..., ...)`: the choice where one image takes so many milliseconds."""

    def choose(cores, *, ms=5.0, count=10_000, free=2**40, shared=2**40, dataset=None, **options):
        monkeypatch.setattr(worker_count, "_seconds_per_image", lambda *_: ms / 1000)
        monkeypatch.setattr(worker_count, "usable_cores", lambda: cores)
        monkeypatch.setattr(worker_count, "free_memory", lambda: free)
        monkeypatch.setattr(worker_count, "free_shared_memory", lambda: shared)
        settings = {
            "batch_size": 64,
            "world_size": 1,
            "local_size": 1,
            "on_gpu": True,
            "cached": False,
            **options,
        }
        return choose_num_workers(samples(dataset or Pictures(count)), **settings)

    return choose


@pytest.mark.parametrize(
    ("cores", "options", "number"),
    [
        (1, {}, 0),
        (2, {}, 1),
        (8, {}, 7),
        (64, {}, worker_count.MOST),
        (16, {"world_size": 4, "local_size": 4}, 3),
        (16, {"world_size": 16, "local_size": 4, "batch_size": 256}, 3),
        (4, {"local_size": 8, "world_size": 8}, 0),
        (16, {"count": 30}, 0),  # a seventh of a second
        (16, {"count": 300}, 5),  # batches
        (16, {"free": 4 * 6 * 64 * BATCH}, 6),
        (16, {"shared": 4 * 2 * 64 * BATCH + 1}, 2),
        (16, {"free": 1000}, 0),
        (1, {"on_gpu": False}, 0),
        (2, {"on_gpu": False}, 0),
        (3, {"on_gpu": False}, 0),
        (16, {"on_gpu": False}, 4),
    ],
)
def test_the_number_follows_from_cores_work_and_memory(on, cores, options, number):
    found = on(cores, **options)
    assert found.number == number
    assert f"{cores // options.get('local_size', 1)} core" in found.reason


def test_the_reason_names_what_limits_the_number(on):
    assert str(on(1)) == "this process alone (1 core)"
    assert str(on(2)).startswith("1 process (") and str(on(4)).startswith("3 processes (")
    assert on(8).reason == "8 cores, 5.0 ms an image"
    assert on(16, count=300).reason == "16 cores, 5.0 ms an image, batches of an epoch"
    assert on(16, free=1000).reason == "16 cores, 5.0 ms an image, memory for batches"
    assert on(1).reason == "1 core"
    assert on(16, local_size=2, world_size=2).reason.startswith("8 cores a process")


@pytest.mark.parametrize(("count", "asked"), [(1, [0] * 5), (9, [0, 2, 4, 6, 8])])
def test_a_few_images_from_all_over_the_data_are_timed(count, asked):
    dataset = Pictures(count)
    assert worker_count._seconds_per_image(samples(dataset), False) > 0
    assert dataset.asked == asked
    assert worker_count._seconds_per_image(samples(Pictures(9, frozenset({0, 4}))), False) > 0
    assert worker_count._seconds_per_image(samples(Pictures(1, frozenset({0}))), False) == 0


def test_of_cached_images_decoding_takes_no_time(monkeypatch):
    """On a clock that each look at a picture sets forward by a second, and nothing else."""
    now = [0.0]
    monkeypatch.setattr(worker_count.time, "perf_counter", lambda: now[0])

    class Slow(Pictures):
        def load(self, index: int) -> Image.Image:
            now[0] += 1
            return super().load(index)

    assert worker_count._seconds_per_image(samples(Slow(9)), False) == 1
    assert worker_count._seconds_per_image(samples(Slow(9)), True) == 0
