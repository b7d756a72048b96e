"""Time a batch whose rows have different adapters against the same batch with one adapter.

    python benchmarks/mixed_batches.py                                      # 8 adapters, Vim-tiny, on the CPU
    python benchmarks/mixed_batches.py --device cuda --batch-size 64 --amp bf16
    python benchmarks/mixed_batches.py --threads 2                          # requests from threads, too

    one        the whole batch under the active adapter
    mixed      `vimtune.forward_mixed`, the rows of each adapter spread over the batch
    grouped    what it is compared with in tests: the rows of each adapter alone, one adapter after the other

They take turns, so that a machine that gets slower meanwhile slows all of them. Printed are medians over the
rounds with the fastest and slowest (on a CPU its time in this process, which the load of others lengthens
less), the speed of each as a share of `one` in the same round, the number of operations that torch is asked
for, views included (a GPU that is faster than they can be asked for waits for them), and the largest
difference between the logits of mixed and grouped.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from turns import describe_machine, take_turns

import vimtune
from vimtune import ops
from vimtune.testing.methods import disturb


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    print(describe_machine(device))
    print(
        f"{options.model}, {options.adapters} adapters, {options.amp or 'fp32'}, batch {options.batch_size}"
    )
    for method in options.methods.split(","):
        model = build_model(options, method, device)
        size = model.pretrained_cfg["input_size"][-1]
        images = torch.randn(options.batch_size, 3, size, size, device=device)
        rows = [vimtune.list_adapters(model)[row % options.adapters] for row in range(options.batch_size)]
        jobs: dict[str, Callable[[], list[Tensor]]] = {
            "one": lambda model=model, images=images: list(model(images)),
            "mixed": lambda model=model, images=images, rows=rows: vimtune.forward_mixed(model, images, rows),
            "grouped": lambda model=model, images=images, rows=rows: run_grouped(model, images, rows),
        }
        jobs = {name: prepared(job, device, options) for name, job in jobs.items()}
        with ops.use_backend(options.backend), torch.no_grad():
            pairs = zip(jobs["mixed"](), jobs["grouped"](), strict=True)
            difference = max((one - other).abs().max().item() for one, other in pairs)
            print(f"{method}, largest difference of the logits {difference:.1e}")
            measure(jobs, device, options.rounds)
        if options.threads > 1:
            print(
                f"  {options.threads} threads: {time_threads(jobs['mixed'], options):.2f} of the time of one"
            )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--methods", default="lora,prodial", help="several, separated by commas")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="default: fp32")
    parser.add_argument("--rounds", type=int, help="default: 7, on a GPU 50")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.rounds = options.rounds or (50 if options.device.startswith("cuda") else 7)
    return options


def build_model(options: argparse.Namespace, method: str, device: torch.device) -> nn.Module:
    """A model with adapters away from their start, whose heads have different numbers of classes."""
    model = timm.create_model(options.model, num_classes=102)
    for number in range(options.adapters):
        vimtune.inject(model, method, name=f"adapter_{number}", num_classes=100 + number)
        disturb(model, number, 0.01)
    return model.eval().to(device)


def run_grouped(model: nn.Module, images: Tensor, rows: list[str]) -> list[Tensor]:
    """The rows of each adapter alone."""
    results: list[Tensor] = [images] * len(rows)
    for name in dict.fromkeys(rows):
        own = [row for row, other in enumerate(rows) if other == name]
        with vimtune.using(model, name):
            for row, logits in zip(own, model(images[own]), strict=True):
                results[row] = logits
    return results


def prepared(
    job: Callable[[], list[Tensor]], device: torch.device, options: argparse.Namespace
) -> Callable[[], list[Tensor]]:
    """A job in the wanted precision. Each call enters autocast for itself, so that none finds weights that
    autocast has rounded for the one before."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.amp or "")

    def run() -> list[Tensor]:
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
            return job()

    return run


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    number = 0

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.number += 1
        return function(*args, **(kwargs or {}))


def measure(jobs: dict[str, Callable[[], list[Tensor]]], device: torch.device, rounds: int) -> None:
    """Print the times of jobs that take turns."""
    gc.collect()
    gc.freeze()  # Else a round in which Python looks through all modules of the models is a slow one.
    times = take_turns(jobs, device, rounds, warmup=10 if device.type == "cuda" else 2)
    for name, own in times.items():
        speed = statistics.median(one / other for one, other in zip(times["one"], own, strict=True))
        span = f"{statistics.median(own):9.2f} ms ({min(own):.2f} to {max(own):.2f})"
        with Operations() as operations:
            jobs[name]()
        print(f"  {name:8} {span:34} {speed:.2f} of the speed of one, {operations.number} operations")
    gc.unfreeze()


def time_threads(job: Callable[[], object], options: argparse.Namespace) -> float:
    """Wall time of batches that several threads ask for at once, over that of one thread."""

    def wall(threads: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: job(), range(2 * options.threads)))
        return time.perf_counter() - start

    wall(options.threads)
    return wall(options.threads) / wall(1)


if __name__ == "__main__":
    main()
