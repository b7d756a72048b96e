"""Time training from images against the bare training step, and reading JPEG files against timm's loader.

    python benchmarks/data_speed.py                                      # generated flowers
    python benchmarks/data_speed.py --dataset flowers --data-dir data --model vim_tiny_patch8_64
    python benchmarks/data_speed.py --device cpu --epochs 4 --batch-size 16 --steps 2 --jpegs 64 \
        --dataset-kwargs species=4,train_per_species=8

Rows of training, all with the same recipe:

    bare       the step as one CUDA graph on one batch that lies on the device (see gpu_train.py)
    none       whole runs of `vimtune.training`: images are decoded in every epoch,
    host       or once, and kept in host memory,
    device     or once, and kept and augmented on the device

img/s of a run are those between the ends of the second and of the last epoch but one, which is all that an
epoch takes but for an evaluation: its steps, the state that is saved, and the way to the next epoch. On a GPU
the graph of full batches is recorded in the first epoch and that of an incomplete last batch in the second.
"start s" is the time until the first step is done: opening data and model, decoding, recording a graph.

Rows of reading, at 224 px from a folder of JPEG files of 500 x 375 pixels that the script makes, with several
names for each, so that an epoch is long enough:

    decode     `vimtune.data.load_image` in one process, so what a core decodes
    all        the same in --num-workers processes at a time, which share caches and memory
    ours       an epoch of our loader, preset light, with --num-workers processes; on the way to a GPU they
               leave the colours to it
    timm       an epoch of timm's loader with the same crops, flips and colours

Both loaders leave batches of bytes in host memory, which are normalised where they arrive.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from gpu_train import time_bare_step
from PIL import Image
from rows import write_rows

from vimtune.data import ImageLoader, build_transform, create_dataset, create_loader, load_image
from vimtune.recipe import Recipe
from vimtune.tasks.images.job import image_size, open_dataset
from vimtune.tasks.images.settings import BackboneSettings, DataSettings
from vimtune.training import Callback, train
from vimtune.training.callbacks import Session, StepRecord
from vimtune.training.state import EpochRecord

CACHES = ("device", "host", "none")
JPEG_SIDE = 224
CLASSES = 4
DECODED = 200
"""Files that a process decodes to see how fast a core is."""
ROUNDS = 8
"""Batches that each process makes in an epoch, at least."""

Row = dict[str, Any]


def main() -> None:
    options = parse_options()
    name = torch.cuda.get_device_name() if on_gpu(options) else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {options.dataset}, {options.model}, {options.method}, "
        f"batch {options.batch_size}, {options.augmentation}, amp {options.amp}, "
        f"{options.num_workers} workers"
    )
    print(f"{'what':>8} {'img/s':>9} {'of bare':>8} {'start s':>8}")
    rows = []
    for measure in (time_training, time_reading):
        for row in measure(options):
            rows.append(row)
            share = f"{row['of_bare']:8.0%}" if "of_bare" in row else " " * 8
            start = f"{row['start']:8.1f}" if "start" in row else ""
            print(f"{row['what']:>8} {row['images_per_second']:9.0f} {share} {start}", flush=True)
    write_rows(options.output, name, rows, options=vars(options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="synthetic_flowers")
    parser.add_argument("--data-dir")
    parser.add_argument("--dataset-kwargs", default={}, help="as vimtune train takes them")
    parser.add_argument("--model", default="vim_nano_patch8_64")
    parser.add_argument("--method", default="prodial")
    parser.add_argument("--augmentation", default="light")
    parser.add_argument("--amp", default="none")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12, help="of each run; at least 4")
    parser.add_argument("--caches", nargs="*", default=CACHES, choices=CACHES)
    parser.add_argument("--jpegs", type=int, default=1000, help="files that differ; 0 leaves reading out")
    parser.add_argument("--steps", type=int, default=50, help="bare steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="JSON file for the rows")
    options = parser.parse_args()
    if options.epochs < 4:
        parser.error("--epochs must be at least 4: the first two and the last one are not timed")
    return options


def on_gpu(options: argparse.Namespace) -> bool:
    """Whether training takes place on a GPU."""
    return torch.cuda.is_available() and options.device != "cpu"


# --- training -----------------------------------------------------------------------------------


def time_training(options: argparse.Namespace) -> Iterator[Row]:
    """The bare step, and a run with each cache."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "dataset": options.dataset,
            "data_dir": options.data_dir,
            "dataset_kwargs": options.dataset_kwargs,
            "download": False,
            "test": False,
            "model": options.model,
            "pretrained": False,
            "peft": options.method,
            "augmentation": options.augmentation,
            "amp": options.amp,
            "batch_size": options.batch_size,
            "num_workers": options.num_workers,
            "epochs": options.epochs,
            "eval_interval": options.epochs,
            "device": options.device,
        }
        bare = time_bare_step(options, Recipe(**values, cache="none"), "bare")
        rate = 1e3 * options.batch_size / bare["step_ms"]
        yield {"what": "bare", "images_per_second": rate}
        for cache in options.caches:
            row = time_run(Recipe(**values, cache=cache, output_dir=str(Path(folder, cache))))
            yield {"what": cache, "of_bare": row["images_per_second"] / rate, **row}


class Times(Callback):
    """When the first step and each epoch of a run were done, as `time.perf_counter` has it."""

    def __init__(self) -> None:
        self.first_step: float | None = None
        self.epochs: list[float] = []

    def on_step(self, session: Session, step: StepRecord) -> None:
        if self.first_step is None:
            self.first_step = time.perf_counter()

    def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
        self.epochs.append(time.perf_counter())


def time_run(recipe: Recipe) -> Row:
    """Images per second between the ends of epochs, and the seconds until the first step was done."""
    started, times = time.perf_counter(), Times()
    with redirect_stdout(io.StringIO()):
        train(recipe, callbacks=[times])
    ends = times.epochs
    assert isinstance(recipe.data, DataSettings) and isinstance(recipe.backbone, BackboneSettings)
    images = len(open_dataset(recipe.data, recipe.data.train_split, image_size(recipe.backbone)))
    # The last epoch ends with an evaluation.
    seconds = (ends[-2] - ends[1]) / (len(ends) - 3)
    return {"images_per_second": images / seconds, "start": (times.first_step or started) - started}


# --- reading ------------------------------------------------------------------------------------


def time_reading(options: argparse.Namespace) -> Iterator[Row]:
    """What a core decodes, and an epoch of our loader and of timm's."""
    if options.jpegs < 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        files = make_jpegs(Path(folder), options.jpegs)
        yield {"what": "decode", "images_per_second": decoding_rate(files)}
        processes = max(1, options.num_workers)
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.map(load_image, files[:processes])  # The first task imports what it needs.
            rates = pool.map(decoding_rate, [files] * processes, chunksize=1)
        yield {"what": "all", "images_per_second": sum(rates)}
        repeat_files(files, ROUNDS * processes * options.batch_size)
        readers: dict[str, Callable[[], Iterable[Any]]] = {
            "ours": our_loader(options, folder).unfinished,
            "timm": timm_loader(options, folder).__iter__,
        }
        for what, epoch in readers.items():
            count_images(epoch())  # The first epoch starts the workers.
            started = time.perf_counter()
            count = count_images(epoch())
            yield {"what": what, "images_per_second": count / (time.perf_counter() - started)}


def decoding_rate(files: list[Path]) -> float:
    """Images per second that this process decodes."""
    started = time.perf_counter()
    for index in range(DECODED):
        load_image(files[index % len(files)])
    return DECODED / (time.perf_counter() - started)


def repeat_files(files: list[Path], number: int) -> None:
    """Give files further names until there are `number` of them."""
    for index in range(len(files), number):
        file = files[index % len(files)]
        file.with_name(f"{index}.jpg").hardlink_to(file)


def make_jpegs(folder: Path, number: int) -> list[Path]:
    """Write JPEG files of smooth noise with some grain, in folders of classes."""
    generator = np.random.default_rng(0)
    files = []
    for index in range(number):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grainy = smooth + generator.integers(-8, 9, smooth.shape, dtype=np.int16)
        file = folder / "train" / f"class{index % CLASSES}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
        files.append(file)
    return files


def our_loader(options: argparse.Namespace, folder: str) -> ImageLoader:
    """Our loader."""
    return create_loader(
        create_dataset("folder", "train", folder),
        build_transform("light", (JPEG_SIDE, JPEG_SIDE), train=True),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=False,
        num_workers=options.num_workers,
        seed=0,
        device=torch.device("cuda" if on_gpu(options) else "cpu"),
    )


def timm_loader(options: argparse.Namespace, folder: str) -> Any:
    """timm's loader with what preset "light" does, without the part that normalises on the device."""
    prefetching = timm.data.create_loader(
        timm.data.create_dataset("", root=str(Path(folder, "train"))),
        input_size=(3, JPEG_SIDE, JPEG_SIDE),
        batch_size=options.batch_size,
        is_training=True,
        scale=(0.6, 1.0),
        color_jitter=(0.2, 0.2, 0.2, 0.02),
        color_jitter_prob=0.8,
        interpolation="bicubic",
        num_workers=options.num_workers,
        persistent_workers=options.num_workers > 0,
        device=torch.device("cpu"),
    )
    return prefetching.loader


def count_images(batches: Iterable[Any]) -> int:
    """Read an epoch of images, labels and perhaps more."""
    return sum(len(batch[1]) for batch in batches)


if __name__ == "__main__":
    main()
