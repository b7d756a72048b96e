"""Time training on 1, 2 and 4 GPUs of one host: our sum of gradients against DistributedDataParallel.

    python benchmarks/gpu_scaling.py                  # Vim-tiny at 224 and 64 px, bf16, ProDiaL and full
    python benchmarks/gpu_scaling.py --gpus 1 2 --methods full --output scaling.json
    python benchmarks/gpu_scaling.py --device cpu --amp none --cases vim_nano_patch8_64:2 --steps 4 --gpus 1 2

Every process has the same batch for its GPU, resident there. The ways take turns, `--rounds` times, in the
processes of one start; a row has the median of the rounds, each as long as its slowest process.

    sum        passes replayed as a CUDA graph, the flat sum of `Processes.sum_gradients_`, AdamW: the step
               alone, as the trainer takes it
    ddp        the same with DistributedDataParallel, eagerly
    ddp_graph  the same with DistributedDataParallel, the whole step in one CUDA graph
    trainer    a whole run of `vimtune.training`: clipping, losses that are looked at, wishes to stop

Efficiency is the rate per GPU divided by that of one GPU on the same way, which has no group of processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_train import CASES, WARMUP_STEPS, random_batch, recipe_of, time_trainer
from rows import write_rows
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vimtune.runtime.distributed import Processes, open_processes
from vimtune.runtime.precision import build_autocast, in_precision
from vimtune.training.gradients import FreshGradients, Gradients, StandingGradients
from vimtune.training.graph import CudaRecorder
from vimtune.training.settings import process_settings

WAYS = ("sum", "ddp", "ddp_graph", "trainer")
DDP_WARMUP = 11
"""Steps after which DistributedDataParallel has settled, before which it cannot be recorded."""

Row = dict[str, Any]
Step = Callable[[], Tensor]


def main() -> None:
    options = parse_options()
    there = torch.cuda.device_count() if options.device != "cpu" else max(options.gpus)
    counts = [count for count in options.gpus if count <= there]
    if left_out := sorted(set(options.gpus) - set(counts)):
        print(f"left out, this machine has {there} GPUs: {left_out}")
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, amp {options.amp}, {options.steps} steps, "
        f"{options.rounds} rounds"
    )
    print(
        f"{'model':24} {'method':8} {'way':>9} {'GPUs':>4} {'img/s/GPU':>9} {'ms/step':>8} {'spread':>7} "
        f"{'efficiency':>10}"
    )
    rows: list[Row] = []
    for case in options.cases:
        model, _, batch_size = case.partition(":")
        for method in options.methods:
            alone: dict[str, float] = {}
            for count in counts:
                for way, times in run_processes(options, model, int(batch_size), method, count).items():
                    milliseconds = statistics.median(times)
                    rate = 1e3 * int(batch_size) / milliseconds
                    alone.setdefault(way, rate)
                    rows.append(
                        {
                            "model": model,
                            "batch_per_gpu": int(batch_size),
                            "method": method,
                            "way": way,
                            "gpus": count,
                            "step_ms": milliseconds,
                            "spread_ms": max(times) - min(times),
                            "images_per_second_per_gpu": rate,
                            "efficiency": rate / alone[way] if counts[0] == 1 else None,
                        }
                    )
                    shown = f"{100 * rate / alone[way]:8.1f} %" if counts[0] == 1 else "-"
                    print(
                        f"{model:24} {method:8} {way:>9} {count:4} {rate:9.0f} {milliseconds:8.2f} "
                        f"{max(times) - min(times):7.2f} {shown:>10}",
                        flush=True,
                    )
    write_rows(options.output, name, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BATCH", help="batch of each GPU")
    parser.add_argument("--methods", nargs="+", default=["prodial", "full"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", help="JSON file for the rows")
    return parser.parse_args()


def run_processes(
    options: argparse.Namespace, model: str, batch_size: int, method: str, count: int
) -> dict[str, list[float]]:
    """Milliseconds of a step in each round, by way, of `count` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (count, port, options, model, batch_size, method, folder), nprocs=count
        )
        found: dict[str, list[float]] = json.loads(Path(folder, "times.json").read_text())
        return found


def work(
    rank: int,
    count: int,
    port: int,
    options: argparse.Namespace,
    model: str,
    batch_size: int,
    method: str,
    folder: str,
) -> None:
    """One process: take the ways in turn; the first one writes what all have found."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # A watchdog that asks for the state of recorded collectives breaks the recording.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    times: dict[str, list[float]] = {}
    with open_processes(options.device) as processes:
        for turn in range(options.rounds):
            for way in options.ways:
                if way == "ddp_graph" and options.device == "cpu":
                    continue
                own = Path(folder, f"{way}{turn}")
                own.mkdir(exist_ok=True)
                recipe = recipe_of(options, model, batch_size * count, method, "auto", str(own))
                gc.collect()
                if way == "trainer":
                    milliseconds = time_trainer(options, recipe, "resident")["step_ms"]
                else:
                    milliseconds = time_step(options, recipe, way, batch_size, processes)
                times.setdefault(way, []).append(max(processes.gather(milliseconds)))
        if processes.is_main:
            Path(folder, "times.json").write_text(json.dumps(times))
        processes.gather(None)


def time_step(
    options: argparse.Namespace, recipe: Any, way: str, batch_size: int, processes: Processes
) -> float:
    """Milliseconds of a step alone."""
    device = processes.device
    on_gpu = device.type == "cuda"
    with process_settings(recipe.run, device):
        job = recipe.task.open(recipe, processes)
        model = job.model.to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=on_gpu, fused=on_gpu or None)
        batch = random_batch(job, batch_size).to(device).tensors
        wrapped: Callable[..., Any] = model
        if way != "sum" and processes.world_size > 1:
            side = torch.cuda.Stream(device) if on_gpu else None
            with torch.cuda.stream(side):  # where it is to be recorded
                wrapped = DistributedDataParallel(
                    model, device_ids=[device.index] if on_gpu else None, gradient_as_bucket_view=True
                )
        forward = in_precision(wrapped, build_autocast(recipe.optimisation.amp, device))
        gradients: Gradients = FreshGradients(trained)
        if on_gpu and way == "sum":
            gradients = StandingGradients(trained, one_batch=True)

        def passes() -> Tensor:
            loss = job.loss(forward, batch) / batch_size
            gradients.add(loss)
            return loss.detach()

        def own_step(run_passes: Callable[[], Any]) -> None:
            gradients.start(empty=False)
            run_passes()
            processes.sum_gradients_(trained)
            optimizer.step()

        def ddp_step() -> Tensor:
            optimizer.zero_grad(set_to_none=not on_gpu)
            loss = passes()
            optimizer.step()
            return loss

        step = prepare(way, passes, own_step, ddp_step, device)
        for _ in range(WARMUP_STEPS):
            step()
        processes.gather(None)
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(options.steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / options.steps


def prepare(
    way: str,
    passes: Step,
    own_step: Callable[[Callable[[], Any]], None],
    ddp_step: Step,
    device: torch.device,
) -> Callable[[], Any]:
    """The step of a way, recorded where it is to be replayed."""
    if way == "ddp" or device.type == "cpu":
        return ddp_step if way != "sum" else lambda: own_step(passes)
    recorder = CudaRecorder(device)
    if way == "ddp_graph":
        for _ in range(DDP_WARMUP):
            recorder.run(ddp_step)
        return recorder.record(ddp_step)[1]
    for _ in range(WARMUP_STEPS):
        own_step(lambda: recorder.run(passes))
    replay = recorder.record(passes)[1]
    return lambda: own_step(replay)


if __name__ == "__main__":
    main()
