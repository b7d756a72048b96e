"""Time the trainer against the bare training step, and so what the trainer costs beside the device's work.

    python benchmarks/gpu_train.py                                  # Vim-tiny at 224 and 64 px, bf16, ProDiaL
    python benchmarks/gpu_train.py --eager                          # without CUDA graphs as well
    python benchmarks/gpu_train.py --cases vim_small_patch16_224:64 --method full --amp none

Rows of a case, all with the same recipe and one random batch:

    bare       forward, backward and AdamW as one CUDA graph on resident data: no clipping, no norm, nobody
               looks at the loss; the mean of steps without a pause
    resident   a whole run of `vimtune.training`, whose loader is replaced by one that yields the batch
               from the device: what the trainer adds
    copied     the same from page-locked host memory: copies count too, decoding and augmentation do not

Times of the trainer are the median of its own log records after the first. Equal losses show that `resident`,
`copied` and their eager runs train the same.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rows import write_rows
from torch import Tensor

from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes, open_processes
from vimtune.runtime.precision import build_autocast, in_precision
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.job import ImageJob, open_images
from vimtune.tasks.job import Batch, Loader
from vimtune.training import run, train
from vimtune.training.graph import CudaRecorder
from vimtune.training.settings import process_settings

CASES = ("vim_tiny_patch16_224:128", "vim_tiny_patch8_64:1024")
NUM_CLASSES = 4
NUM_RECORDS = 4
"""Log records of a run; the first one has the warm-up."""
WARMUP_STEPS = 3

Row = dict[str, Any]


class OneBatch(Loader):
    """One random batch, `num_batches` times an epoch, in place of the loader of the training images."""

    def __init__(self, job: ImageJob, batch_size: int, num_batches: int, device: torch.device) -> None:
        self.split, self.source = job.train.split, job.train.source
        self.num_examples = job.train.num_examples
        self.batch = random_batch(job, batch_size)
        if device.type != "cpu":
            self.batch = self.batch.to(device)
        elif torch.cuda.is_available():
            pinned = {name: tensor.pin_memory() for name, tensor in self.batch.tensors.items()}
            self.batch = Batch(pinned, batch_size)
        self.num_batches = num_batches

    def fingerprint(self) -> str:
        """The batch is the same in every run."""
        return "one batch"

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Every position has the same batch."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.num_batches)


def random_batch(job: ImageJob, batch_size: int) -> Batch:
    """Images and labels as `job` expects them, in host memory."""
    generator = torch.Generator().manual_seed(0)
    size = job.saved_with_adapter["preprocessing"]["img_size"]
    images = torch.randn(batch_size, 3, *size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return Batch({"images": images, "labels": labels}, batch_size)


def main() -> None:
    options = parse_options()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {options.method}, amp {options.amp}, {options.steps} steps a run"
    )
    print(
        f"{'model':24} {'batch':>5} {'what':>8} {'graph':>5} {'img/s':>8} {'ms/step':>8} {'over bare':>9} "
        f"{'GiB':>6} {'loss':>10} {'s':>5}"
    )
    rows = []
    for case in options.cases:
        model, _, batch_size = case.partition(":")
        bare_ms = 0.0
        for row in measure(options, model, int(batch_size)):
            rows.append(row)
            bare_ms = row["step_ms"] if row["what"] == "bare" else bare_ms
            print(
                f"{row['model']:24} {row['batch_size']:5} {row['what']:>8} "
                f"{'yes' if row['cuda_graph'] else 'no':>5} {row['images_per_second']:8.0f} "
                f"{row['step_ms']:8.2f} {row['step_ms'] - bare_ms:9.2f} {row['peak_gib']:6.2f} "
                f"{row['last_loss']:10.6f} {row['seconds']:5.1f} {' '.join(row['warnings'])}",
                flush=True,
            )
    write_rows(options.output, name, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BATCH")
    parser.add_argument("--eager", action="store_true", help="time the trainer without CUDA graphs too")
    parser.add_argument("--method", default="prodial")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="JSON file for the rows")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: str, batch_size: int) -> Iterator[Row]:
    """The rows of a case, one by one."""
    tasks: list[tuple[str, str, Callable[[argparse.Namespace, Recipe, str], Row]]] = [
        ("bare", "auto", time_bare_step),
        ("resident", "auto", time_trainer),
        ("copied", "auto", time_trainer),
    ]
    if options.eager:
        tasks += [("resident", "off", time_trainer), ("copied", "off", time_trainer)]
    for what, cuda_graph, task in tasks:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(options, model, batch_size, options.method, cuda_graph, folder)
            row = task(options, recipe, what)
        yield {
            "model": model,
            "batch_size": batch_size,
            "what": what,
            "method": options.method,
            "amp": options.amp,
            "images_per_second": 1e3 * batch_size / row["step_ms"],
            "seconds": time.perf_counter() - started,
            **row,
        }


def recipe_of(
    options: argparse.Namespace, model: str, batch_size: int, method: str, cuda_graph: str, folder: str
) -> Recipe:
    """A run of `options.steps` steps on hardly any images of its own; its folder lies in `folder`."""
    return Recipe(
        dataset="synthetic_flowers",
        dataset_kwargs={
            "species": NUM_CLASSES,
            "train_per_species": 1,
            "val_per_species": 1,
            "test_per_species": 1,
        },
        num_workers=0,
        augmentation="none",
        transforms="torchvision",
        model=model,
        pretrained=False,
        peft=method,
        epochs=1,
        max_steps=options.steps,  # as many as there are, which says that few are meant
        warmup_epochs=0,
        batch_size=batch_size,
        amp=options.amp,
        cuda_graph=cuda_graph,
        device=options.device,
        output_dir=str(Path(folder, "run")),
        log_interval=max(1, options.steps // NUM_RECORDS),
    )


def time_bare_step(options: argparse.Namespace, recipe: Recipe, what: str) -> Row:
    """The step alone; eagerly where there is no GPU."""
    with open_processes(recipe.run.device) as processes, process_settings(recipe.run, processes.device):
        device = processes.device
        on_gpu = device.type == "cuda"
        job = recipe.task.open(recipe, processes)
        model, autocast = job.model.to(device).train(), build_autocast(recipe.optimisation.amp, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=recipe.optimisation.lr, capturable=on_gpu, fused=on_gpu or None
        )
        batch = random_batch(job, recipe.optimisation.batch_size).to(device).tensors
        forward = in_precision(model, autocast)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = job.loss(forward, batch) / recipe.optimisation.batch_size
            loss.backward()
            optimizer.step()
            return loss.detach()

        if on_gpu:
            recorder = CudaRecorder(device)
            for _ in range(WARMUP_STEPS):
                recorder.run(step)
            loss, run = recorder.record(step)
            run()
            torch.cuda.synchronize()
        else:
            loss, run = step(), step
        start = time.perf_counter()
        for _ in range(options.steps):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {
            "cuda_graph": on_gpu,
            "step_ms": 1e3 * seconds / options.steps,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
            "last_loss": loss.item(),
            "warnings": [],
        }


def time_trainer(options: argparse.Namespace, recipe: Recipe, what: str) -> Row:
    """A run of `options.steps` optimizer steps."""

    def with_one_batch(task: Classification, recipe: Recipe, processes: Processes) -> ImageJob:
        job = open_images(recipe, task, processes)
        place = processes.device if what == "resident" else torch.device("cpu")
        job.train = OneBatch(
            job, recipe.optimisation.batch_size // processes.world_size, options.steps, place
        )
        return job

    with (
        redirect_stdout(io.StringIO()),
        mock.patch.object(Classification, "open", with_one_batch),
        # Drawing takes longer than the steps.
        mock.patch.object(run, "conclude", lambda report, *_: report),
    ):
        report = train(recipe)
    assert recipe.run.output_dir is not None
    lines = Path(recipe.run.output_dir, "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "grad_norm" in record]
    rate = statistics.median(record["images_per_second"] for record in records[1:])
    return {
        "cuda_graph": report.cuda_graph,
        "step_ms": 1e3 * recipe.optimisation.batch_size / rate,
        "peak_gib": report.peak_memory / 2**10,
        "last_loss": records[-1]["loss"],
        "warnings": report.warnings,
    }


if __name__ == "__main__":
    main()
