"""Time the trainer itself, eagerly and with batches replayed as a CUDA graph.

    python benchmarks/gpu_train.py                                  # Vim-tiny at 64 and 224 px, bf16, ProDiaL
    python benchmarks/gpu_train.py --cases vim_small_patch16_224:64 --method full --amp none

Each case is a whole run of `vimtune.train`, whose loader is replaced by one that yields the same batch
from pinned memory: copies to the GPU count, decoding and augmentation do not. The rate is the median of
the trainer's own log records after the first. The last losses show that both ways train the same.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vimtune.recipe import Recipe
from vimtune.train import train, trainer

CASES = ["vim_tiny_patch8_64:256", "vim_tiny_patch8_64:1024", "vim_tiny_patch16_224:128"]
NUM_CLASSES = 4


class ResidentLoader:
    """One random batch, `num_batches` times an epoch, in place of the loader of the training images."""

    def __init__(self, replaced: Any, size: tuple[int, int], batch_size: int, num_batches: int) -> None:
        self.dataset, self.skipped_paths = replaced.dataset, replaced.skipped_paths
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, 3, *size, generator=generator)
        labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
        pinned = torch.cuda.is_available()
        self.batch = (images.pin_memory(), labels.pin_memory()) if pinned else (images, labels)
        self.num_batches = num_batches

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Every position has the same batch."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.num_batches)


def main() -> None:
    options = parse_options()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {options.method}, amp {options.amp}, {options.steps} steps a run"
    )
    print(
        f"{'model':24} {'batch':>5} {'graph':>5} {'img/s':>8} {'ms/step':>8} {'GiB':>6} {'loss':>10} {'s':>6}"
    )
    rows = []
    for case in options.cases:
        model, _, batch_size = case.partition(":")
        for mode in options.modes:
            row = measure(options, model, int(batch_size), mode)
            rows.append(row)
            print(
                f"{row['model']:24} {row['batch_size']:5} {'yes' if row['cuda_graph'] else 'no':>5} "
                f"{row['images_per_second']:8.0f} {row['step_ms']:8.2f} {row['peak_gib']:6.2f} "
                f"{row['last_loss']:10.6f} {row['seconds']:6.1f} {' '.join(row['warnings'])}",
                flush=True,
            )
    if options.output:
        Path(options.output).write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows})
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BATCH")
    parser.add_argument("--modes", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--method", default="prodial")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="JSON file for the rows")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: str, batch_size: int, mode: str) -> dict[str, Any]:
    """One run of `options.steps` optimizer steps."""
    build_job = trainer.build_job

    def with_resident_batches(recipe: Recipe, processes: Any) -> Any:
        job = build_job(recipe, processes)
        height, width = job.preprocessing["img_size"]
        job.train = ResidentLoader(job.train, (height, width), batch_size, options.steps)
        return job

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        mock.patch.object(trainer, "build_job", with_resident_batches),
    ):
        report = train(
            Recipe(
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
                peft=options.method,
                epochs=1,
                warmup_epochs=0,
                batch_size=batch_size,
                amp=options.amp,
                cuda_graph=mode,
                device=options.device,
                output_dir=str(Path(folder, "run")),
                log_interval=max(1, options.steps // 4),
            )
        )
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "grad_norm" in record]
    rate = statistics.median(record["images_per_second"] for record in records[1:])
    return {
        "model": model,
        "method": options.method,
        "amp": options.amp,
        "batch_size": batch_size,
        "cuda_graph": report.cuda_graph,
        "images_per_second": rate,
        "step_ms": 1e3 * batch_size / rate,
        "peak_gib": report.peak_memory / 2**10,
        "last_loss": records[-1]["loss"],
        "warnings": report.warnings,
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
