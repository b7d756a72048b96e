"""Time a forward pass and a fine-tuning step on the CPU with every scan backend, in one run.

    python benchmarks/cpu_step.py                                   # Vim-tiny, 224 px, batch 8, ProDiaL
    python benchmarks/cpu_step.py --model vim_tiny_patch8_64 --batch-size 64 --backends cpu torch
    python benchmarks/cpu_step.py --peft lora --threads 1

The naive reference (`vimtune/ops/reference.py`, differentiated by autograd) is what the others are
compared with: their times as ratios, their logits and gradients as deviations. Backends take turns,
so that a machine that gets slower meanwhile slows all of them; medians over the rounds, with the
fastest and slowest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import vimtune  # noqa: F401  (registers the models)
from vimtune import ops
from vimtune.machine import processor_name

REFERENCE = "reference"


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kwargs = {} if options.img_size is None else {"img_size": options.img_size}
    model = timm.create_model(options.model, num_classes=102, peft=options.peft, **kwargs)
    size = options.img_size or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(options.batch_size, 3, size, size)
    labels = torch.randint(102, (options.batch_size,))
    print(describe_machine())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{options.model}, {options.peft} ({trainable:,} trained parameters), fp32, "
        f"batch {options.batch_size} at {size} px"
    )

    backends = [name for name in options.backends if usable(name)]
    jobs: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, images),
        "forward + backward": lambda: step(model, images, labels),
    }
    times: dict[tuple[str, str], list[float]] = {(b, j): [] for b in backends for j in jobs}
    results = {}
    for backend in backends:
        if backend != REFERENCE:  # warm-up; the reference takes too long and gains nothing
            with ops.use_backend(backend):
                step(model, images, labels)
    for turn in range(options.rounds):
        for backend in backends:
            if backend == REFERENCE and turn >= options.reference_rounds:
                continue
            with ops.use_backend(backend):
                for job, run in jobs.items():
                    start = time.perf_counter()
                    result = run()
                    times[backend, job].append(time.perf_counter() - start)
                    results[backend, job] = result
    report(backends, list(jobs), times, results)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--peft", default="prodial")
    parser.add_argument("--backends", nargs="+", default=[REFERENCE, "torch", "cpu"], help="in this order")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference-rounds", type=int, default=1, help="the reference takes tens of seconds")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    return parser.parse_args()


def usable(backend: str) -> bool:
    for row in ops.backend_report("cpu"):
        if row.name == backend and not row.available:
            print(f"leaving out {backend}: {'; '.join(row.reasons)}")
            return False
    return True


def forward(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(images)


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradients of every trained parameter, as one vector."""
    model.train()
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def report(backends: list[str], jobs: list[str], times: dict, results: dict) -> None:
    for job in jobs:
        print(f"\n{job:20} {'median s':>9} {'min':>8} {'max':>8} {'runs':>5} {'speed-up':>9}  deviation")
        baseline = statistics.median(times[backends[0], job])
        exact = results[backends[0], job].double()
        for backend in backends:
            seconds = times[backend, job]
            deviation = ((results[backend, job].double() - exact).abs().max() / exact.abs().max()).item()
            print(
                f"  {backend:18} {statistics.median(seconds):9.3f} {min(seconds):8.3f} {max(seconds):8.3f} "
                f"{len(seconds):5} {baseline / statistics.median(seconds):8.1f}x  {deviation:.1e}"
            )
    print(f"\nspeed-up and deviation (of the largest logit, the largest gradient) against {backends[0]!r}")


def describe_machine() -> str:
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor_name()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{load}; "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    )


if __name__ == "__main__":
    main()
