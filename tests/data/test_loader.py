"""The loader gives the same batches for any number of workers, and says what damaged images cost."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from photos import epoch
from PIL import Image

from vimtune.data import (
    CorruptImageError,
    DatasetError,
    ImageDataset,
    ImageReadError,
    TooManyCorruptError,
    WorkerError,
    build_transform,
    create_dataset,
    create_loader,
    load_image,
)
from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.data.loading.samples import sample_seed
from vimtune.data.loading.workers import prepare_worker, worker_context

SIZE = (16, 16)


def flowers(images: int = 5, species: int = 4) -> ImageDataset:
    return create_dataset(
        "synthetic_flowers", "train", img_size=SIZE, species=species, train_per_species=images
    )


def make(ds=None, *, library: str = "albumentations", preset: str = "strong", **changes):
    options = {
        "batch_size": 6,
        "shuffle": True,
        "drop_last": False,
        "num_workers": 0,
        "seed": 3,
    } | changes
    transform = build_transform(preset, SIZE, train=True, crop_pct=1.0, library=library)
    return create_loader(ds or flowers(), transform, **options)


def workers_of(loader) -> set[int]:
    """Process numbers of the loader's workers; those of other tests may still be about to end."""
    return {worker.pid for worker in loader._loader._iterator._workers}


def alive() -> set[int]:
    """Process numbers of all workers that live."""
    return {worker.pid for worker in multiprocessing.active_children()}


def assert_same(one, two) -> None:
    assert len(one) == len(two)
    for (x, y), (p, q) in zip(one, two, strict=True):
        assert torch.equal(x, p) and torch.equal(y, q)


@pytest.mark.parametrize("library", ["albumentations", "torchvision"])
def test_any_number_of_workers_gives_the_same_batches(library: str) -> None:
    alone, shared = make(library=library), make(library=library, num_workers=2)
    for number in (0, 1):  # the second epoch runs in the surviving workers
        assert_same(epoch(alone, number), epoch(shared, number))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_travel_as_bytes_and_are_normalised_where_they_arrive(workers: int) -> None:
    loader, transform = make(num_workers=workers), build_transform("strong", SIZE, train=True, crop_pct=1.0)
    finished = epoch(loader)
    loader.set_position(0)
    for (images, labels), (parts, same, places) in zip(finished, loader.unfinished(), strict=True):
        (pixels,) = parts.values()
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(places), *SIZE, 3)
        assert pixels.is_shared() == (workers > 0)
        assert torch.equal(loader.finish(parts), images) and torch.equal(same, labels)
        one = transform(loader.dataset.load(int(places[0])), sample_seed(3, 0, int(places[0])))
        assert torch.equal(one, images[0])
    loader.close()


def test_epochs_differ_and_repeat() -> None:
    loader = make()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert not torch.equal(first[0][0], second[0][0])
    assert_same(epoch(loader, 0), first)
    for batches in (first, second):
        assert Counter(torch.cat([y for _, y in batches]).tolist()) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_the_position_does_not_touch_global_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    list(make(num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_together_see_the_single_process_batches(world: int, shuffle: bool) -> None:
    whole = epoch(make(shuffle=shuffle), 2)
    ranks = [epoch(make(shuffle=shuffle, rank=r, world_size=world), 2) for r in range(world)]
    for i, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([rank[i][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[i][1] for rank in ranks]), labels)
    assert len({len(rank) for rank in ranks}) == 1


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 1), (0, 3), (0, 4), (2, 1), (2, 4)])
def test_resuming_at_a_batch_reproduces_the_rest(workers: int, start: int) -> None:
    whole = epoch(make(), 1)
    assert len(whole) == 4
    loader = make(num_workers=workers)
    assert_same(epoch(loader, 1, start), whole[start:])
    assert len(loader) == 4
    assert_same(epoch(loader, 2), epoch(make(), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_no_trace(workers: int) -> None:
    loader = make(num_workers=workers)
    loader.set_position(0)
    for _ in loader:
        break
    assert_same(epoch(loader, 1), epoch(make(), 1))


def test_reading_ahead_changes_nothing() -> None:
    """Neither at the position that is iterated then, nor at another one."""
    expected = [epoch(make(), number) for number in (0, 1)]
    loader = make(num_workers=1)
    for ahead, number in ((0, 0), (1, 1), (5, 1), (0, 1)):
        loader.set_position(ahead)
        for _ in range(2):  # the second time there is nothing to do
            loader.read_ahead()
        assert_same(epoch(loader, number), expected[number])
    loader.read_ahead()
    workers = workers_of(loader)
    assert workers <= alive()
    loader.close()
    assert not workers & alive()


def test_workers_begin_when_they_are_told(tmp_path) -> None:
    ds, painted = flowers(), tmp_path / "painted"
    load = ds.load
    ds.load = lambda index: painted.touch() or load(index)
    alone, loader = make(ds), make(ds, num_workers=1)
    alone.read_ahead()  # there is nobody who could
    assert not painted.exists()
    loader.read_ahead()
    deadline = time.monotonic() + 60
    while not painted.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert painted.exists()
    loader.close()


def test_what_fails_ahead_is_told_when_it_is_read(monkeypatch) -> None:
    def no_more(self, *arguments):
        raise OSError(24, "Too many open files")

    loader = make(num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.data.DataLoader.__iter__", no_more)
        loader.read_ahead()
    assert "open files" in str(failure(loader))
    assert_same(epoch(loader), epoch(make()))  # and tried again
    workers = workers_of(loader)
    assert workers <= alive()
    del loader
    assert not workers & alive()  # without the garbage collector, which cannot end them in good order


def test_unshuffled_order_is_the_data_sets() -> None:
    ds = flowers()
    labels = torch.cat([y for _, y in epoch(make(ds, shuffle=False))])
    assert labels.tolist() == ds.targets


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_changes_nothing_but_the_decoding(workers: int, monkeypatch) -> None:
    ds = flowers()
    plain = [epoch(make(ds), n) for n in (0, 1)]
    calls = []
    load = ds.load
    monkeypatch.setattr(ds, "load", lambda i: calls.append(i) or load(i))
    loader = make(ds, cache=True, num_workers=workers)
    assert sorted(calls) == list(range(20))
    monkeypatch.setattr(ds, "load", lambda i: pytest.fail("decoded again"))
    for number in (0, 1):
        assert_same(epoch(loader, number), plain[number])


def test_cache_stops_at_its_budget(monkeypatch) -> None:
    monkeypatch.setattr("vimtune.data.loading.samples.free_memory", lambda: 2 * 7 * 16 * 16 * 3)
    loader = make(cache=True)
    assert len(loader._samples._cached) == 7
    assert_same(epoch(loader), epoch(make()))


def test_a_process_without_workers_decodes_few_images_once(monkeypatch) -> None:
    """As many as there is room for; what is kept changes nothing."""
    ds, calls = flowers(), []
    expected = [epoch(make(ds, num_workers=1), number) for number in (0, 1)]
    load = ds.load
    monkeypatch.setattr(ds, "load", lambda i: calls.append(i) or load(i))
    for kept in (0, 7, 20):
        monkeypatch.setattr("vimtune.data.loading.samples._KEPT", kept * 16 * 16 * 3)
        loader = make(ds)
        for number in (0, 1):
            calls.clear()
            assert_same(epoch(loader, number), expected[number])
            assert len(calls) == (20 if number == 0 else 20 - kept)


def test_of_images_that_are_read_once_none_is_kept(monkeypatch) -> None:
    ds, calls = flowers(), []
    load = ds.load
    monkeypatch.setattr(ds, "load", lambda i: calls.append(i) or load(i))
    for cache in ("none", "host", "device"):
        loader = make(ds, cache=cache, once=True)
        assert not calls
        epoch(loader), epoch(loader)
        assert len(calls) == 40
        calls.clear()


class Damaged(ImageDataset):
    """Ten small files of two classes; numbers 2 and 7 are truncated JPEGs."""

    name = "damaged"

    def __init__(self, folder) -> None:
        self.classes, self.split, self.source = ["a", "b"], "train", "test"
        self.targets = [i % 2 for i in range(10)]
        self.paths = [folder / f"{i}.jpg" for i in range(10)]
        folder.mkdir(exist_ok=True)
        for i, path in enumerate(self.paths):
            Image.effect_noise((40, 40), 20 * i).save(path)
            if i in (2, 7):
                path.write_bytes(path.read_bytes()[:400])

    def load(self, index: int) -> Image.Image:
        return load_image(self.paths[index])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (0, True), (1, False), (1, True)])
def test_corrupt_image_stops_with_its_path(workers: int, cache: bool, tmp_path) -> None:
    loader = make(Damaged(tmp_path), num_workers=workers, shuffle=False, batch_size=2, cache=cache)
    message = path = ""
    try:  # not pytest.raises: the traceback it keeps would keep the workers alive
        list(loader)
    except CorruptImageError as error:
        message, path = str(error), error.path
    assert path == str(tmp_path / "2.jpg")
    assert path in message and "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_skipped_counted_and_named_once(workers: int, tmp_path, caplog) -> None:
    ds = Damaged(tmp_path)
    loader = make(ds, num_workers=workers, shuffle=False, batch_size=4, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        sizes = [[len(y) for _, y in epoch(loader, n)] for n in (0, 1)]
    assert sizes == [[3, 3, 2]] * 2
    assert loader.num_skipped == 4
    assert loader.skipped_paths == {str(tmp_path / "2.jpg"), str(tmp_path / "7.jpg")}
    assert sum("2.jpg" in record.message for record in caplog.records) == 1
    loader.set_position(0, 1)
    assert [places.tolist() for _, _, places in loader.unfinished()] == [[4, 5, 6], [8, 9]]


def test_a_batch_of_corrupt_images_is_empty_but_shaped(tmp_path) -> None:
    loader = make(Damaged(tmp_path), shuffle=False, batch_size=1, on_corrupt="skip")
    images, labels = list(loader)[2]
    assert images.shape == (0, 3, *SIZE) and labels.shape == (0,) and labels.dtype == torch.int64


class Broken(Damaged):
    """Images of which `which(index)` raises `error`; the others are as in `Damaged`."""

    def __init__(self, folder, which, error) -> None:
        super().__init__(folder)
        self.which, self.error = which, error

    def load(self, index: int) -> Image.Image:
        if self.which(index):
            raise self.error
        return Image.new("RGB", (16, 16))


def failure(loader) -> ValueError | None:
    """What an epoch of the loader raises, without the traceback, which would keep the workers alive."""
    try:
        list(loader)
    except ValueError as error:
        return error.with_traceback(None)
    return None


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_corrupt", ["skip", "error"])
def test_errors_of_the_system_are_never_skipped(workers: int, on_corrupt: str, tmp_path) -> None:
    ds = Broken(tmp_path, lambda index: index == 3, ImageReadError("/data/3.jpg", "Input/output error"))
    error = failure(make(ds, num_workers=workers, on_corrupt=on_corrupt))
    assert isinstance(error, ImageReadError) and error.path == "/data/3.jpg"
    assert "Input/output error" in str(error) and "Traceback" not in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_vanishes_stops_the_run(workers: int, tmp_path) -> None:
    ds = Damaged(tmp_path / "images")
    loader = make(ds, num_workers=workers, on_corrupt="skip")
    assert sum(len(labels) for _, labels in loader) == 8
    shutil.rmtree(tmp_path / "images")
    assert isinstance(failure(loader), ImageReadError)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("corrupt", "stops"), [(range(10), True), (range(6), True), (range(5), False), (range(9, 10), False)]
)
def test_an_epoch_mostly_of_corrupt_images_is_an_error(workers: int, corrupt: range, stops: bool, tmp_path):
    ds = Broken(tmp_path, lambda index: index in corrupt, CorruptImageError("x.jpg", "damaged"))
    loader = make(ds, num_workers=workers, on_corrupt="skip", batch_size=2)
    error = failure(loader)
    assert isinstance(error, TooManyCorruptError if stops else type(None))
    if stops:
        assert f"{len(corrupt)} of the 10 images" in str(error) and "x.jpg" in str(error)
    loader.set_position(0, 4)  # the rest of an epoch alone says nothing about it
    assert failure(loader) is None


def test_many_corrupt_images_stop_an_epoch_early(monkeypatch) -> None:
    ds = flowers(images=60)
    turns = []

    def load(index: int) -> Image.Image:
        turns.append(index)
        raise CorruptImageError("x.jpg", "damaged")

    monkeypatch.setattr(ds, "load", load)
    assert isinstance(failure(make(ds, on_corrupt="skip", batch_size=8)), TooManyCorruptError)
    assert 100 <= len(turns) < 120


@pytest.mark.parametrize("between", ["batches", "epochs"])
def test_a_dead_worker_ends_the_epoch_with_one_line(between: str) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = make(flowers(images=200), num_workers=2, batch_size=2)
    batches = iter(loader)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    for worker in loader._loader._iterator._workers:
        worker.kill()
        worker.join(10)
    if between == "epochs":
        batches.close()
        batches = iter(loader)
    error = failure(batches)
    assert isinstance(error, WorkerError) and isinstance(error, DatasetError)
    assert "--num-workers" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), WorkerError),
        (
            RuntimeError("Too many open files. Communication with the workers is no longer possible"),
            WorkerError,
        ),
        (OSError(24, "Too many open files"), WorkerError),
        (EOFError(), WorkerError),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: bug"),
            RuntimeError,
        ),
        (OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback: bug"), OSError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_only_what_happens_to_the_workers_is_reworded(raised, expected, monkeypatch) -> None:
    loader = make(num_workers=1)

    def fail(self):
        raise raised

    monkeypatch.setattr(type(loader._loader), "__iter__", fail)
    with pytest.raises(expected) as error:
        list(loader)
    assert type(error.value) is expected


def test_last_batch() -> None:
    sizes = [len(y) for _, y in epoch(make(batch_size=8))]
    assert sizes == [8, 8, 4]
    assert [len(y) for _, y in epoch(make(batch_size=8, drop_last=True))] == [8, 8]
    assert len(make(batch_size=8)) == 3 and len(make(batch_size=8, drop_last=True)) == 2
    assert [len(y) for _, y in epoch(make(batch_size=64))] == [20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32, "drop_last": True}, "no batch left: 20 images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore'"),
        ({"batch_size": 5, "drop_last": True, "world_size": 2}, "multiple of 2"),
    ],
)
def test_bad_settings_are_explained(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_positions_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="start_batch=9"):
        make().set_position(0, 9)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_the_process_group(number: int) -> None:
    """Ctrl-C and schedulers signal all processes; the main one decides when to stop."""
    loader = make(num_workers=2, batch_size=2)
    expected = epoch(loader, 1)
    before = workers_of(loader)
    loader.set_position(0)
    batches = iter(loader)
    next(batches)
    for worker in before:
        os.kill(worker, number)
    assert len(list(batches)) == len(loader) - 1
    assert_same(epoch(loader, 1), expected)
    assert workers_of(loader) == before and before <= alive()


def test_a_worker_takes_no_alarm_handler_from_the_main_process() -> None:
    """It ends itself by an alarm some time after SIGTERM, which such a handler would swallow."""

    def work() -> None:
        prepare_worker(0)
        os.kill(os.getpid(), signal.SIGALRM)

    former = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        worker = worker_context(1).Process(target=work)
        worker.start()
        worker.join(60)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert worker.exitcode == -signal.SIGALRM


# --------------------------------------------------------------------------- balanced epochs


class Uneven(ImageDataset):
    """Images of 1, 4 and 15 of three classes, each of a colour of its own."""

    def __init__(self) -> None:
        self.split, self.source, self.classes = "train", "uneven", ["a", "b", "c"]
        self.targets = [0] + [1] * 4 + [2] * 15

    def load(self, index: int) -> Image.Image:
        noise = torch.randint(0, 255, (24, 24, 3), generator=torch.Generator().manual_seed(index))
        return Image.fromarray(noise.to(torch.uint8).numpy())

    def describe(self, index: int) -> str:
        return f"image {index}"


def test_a_balanced_epoch_has_equally_many_of_each_class_and_uses_all_it_can() -> None:
    sampler = BatchSampler(20, 6, True, False, 3, 0, 1, Uneven().targets)
    seen: set[int] = set()
    for number in range(12):
        keys = [key for batch in epoch_keys(sampler, number) for key in batch]
        assert len(keys) == 20 and len(set(keys)) == 20
        counts = Counter(Uneven().targets[key.image] for key in keys)
        assert sorted(counts.values()) == [6, 7, 7]
        times = Counter(key.image for key in keys)
        assert times[0] == counts[0] and {times[image] for image in range(1, 5)} <= {1, 2}
        assert all(times[image] <= 1 for image in range(5, 20))
        assert all(key.turn < times[key.image] for key in keys)
        seen |= times.keys()
    assert seen == set(range(20))
    assert epoch_keys(sampler, 1) == epoch_keys(sampler, 1) != epoch_keys(sampler, 2)


def epoch_keys(sampler: BatchSampler, number: int, start: int = 0) -> list:
    sampler.epoch, sampler.start_batch = number, start
    return list(sampler)


@pytest.mark.parametrize("cache", ["none", "device"])
def test_balanced_batches_are_those_of_any_ranks_and_positions_and_repeats_are_augmented_anew(cache) -> None:
    options = {"balanced": True, "cache": cache}
    whole = epoch(make(Uneven(), **options), 2)
    assert_same(epoch(make(Uneven(), **options), 2, 2), whole[2:])
    ranks = [epoch(make(Uneven(), **options, rank=rank, world_size=2), 2) for rank in range(2)]
    joined = [
        tuple(torch.cat(parts) for parts in zip(one, two, strict=True))
        for one, two in zip(*ranks, strict=True)
    ]
    for (x, y), (p, q) in zip(joined, whole, strict=True):
        assert torch.allclose(x, p, atol=1e-4) and torch.equal(y, q)
    images, labels = (torch.cat(parts) for parts in zip(*whole, strict=True))
    rare = images[labels == 0]  # One image, and as many augmentations of it as it comes.
    assert len(rare) >= 6 and len({tuple(image.flatten().tolist()) for image in rare}) == len(rare)
