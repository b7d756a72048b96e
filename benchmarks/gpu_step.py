"""Time forward passes and training steps side by side: our backends, mamba-ssm's kernels, a timm ViT.

    python benchmarks/gpu_step.py                                        # Vim-tiny, 224 px, batch 128
    python benchmarks/gpu_step.py --scale small --img-sizes 224 448 --batch-size 32
    python benchmarks/gpu_step.py --backends triton cuda --methods forward lora prodial full

A step is forward, backward and AdamW on resident random images, under bf16 autocast (fp32 on the CPU).
Each case runs eagerly and, on a GPU, as replays of one CUDA graph. Medians with the fastest and slowest;
peak memory of the eager step. Tables go to stdout, the same rows to --output as JSON and PNG.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from torch import nn

import vimtune  # noqa: F401  (registers the models)
from vimtune import ops

PAIRS = {
    "tiny": ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
    "small": ("vim_small_patch16_224", "deit_small_patch16_224"),
    "test": ("test_vim", "test_vit"),
}
VIT = "vit"
METHODS = ("forward", "linear", "lora", "dora", "prodial", "full")
NUM_CLASSES = 102


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, batch {options.batch_size}, {options.rounds} rounds")
    rows = []
    for size in options.img_sizes:
        print(f"\n{options.scale}, {size} px")
        header = f"{'kernels':10} {'method':9} {'eager ms':>9} {'graph ms':>9} {'spread':>16}"
        print(f"{header} {'img/s':>8} {'GiB':>6}")
        for backend in [*options.backends, VIT]:
            refusal = refused(backend, device)
            if refusal:
                print(f"{backend:10} left out: {refusal}")
                continue
            for method in options.methods:
                if backend == VIT and method not in ("forward", "linear", "full"):
                    continue
                with nullcontext() if backend == VIT else ops.use_backend(backend):
                    row = measure(options, backend, method, size, device)
                rows.append(row)
                spread = f"{row['fastest_ms']:.2f} to {row['slowest_ms']:.2f}"
                print(
                    f"{backend:10} {method:9} {row['eager_ms']:9.2f} {row['graph_ms'] or float('nan'):9.2f} "
                    f"{spread:>16} {row['images_per_second']:8.0f} {row['peak_gib']:6.2f}"
                )
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "torch": torch.__version__, "rows": rows}
        (folder / "gpu_step.json").write_text(json.dumps(report, indent=1))
        plot(rows, folder / "gpu_step.png")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=PAIRS, default="tiny")
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], help="scan backends to compare")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="folder for gpu_step.json and gpu_step.png")
    return parser.parse_args()


def refused(backend: str, device: torch.device) -> str:
    if backend == VIT:
        return ""
    for row in ops.backend_report(device):
        if row.name == backend and not row.available:
            return "; ".join(row.reasons)
    return ""


def build_model(scale: str, backend: str, method: str, size: int) -> nn.Module:
    vim, vit = PAIRS[scale]
    if backend == VIT:
        model = timm.create_model(vit, num_classes=NUM_CLASSES, img_size=size)
        if method == "linear":
            model.requires_grad_(False)
            model.get_classifier().requires_grad_(True)
        return model
    peft = {} if method == "forward" else {"peft": method}
    return timm.create_model(vim, num_classes=NUM_CLASSES, img_size=size, **peft)


def measure(options: argparse.Namespace, backend: str, method: str, size: int, device: torch.device) -> dict:
    """One case: the step eagerly and as a CUDA graph."""
    torch.manual_seed(0)
    model = build_model(options.scale, backend, method, size).to(device)
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    labels = torch.randint(NUM_CLASSES, (options.batch_size,), device=device)
    on_gpu = device.type == "cuda"
    # Cached casts would outlive the graph that made them.
    autocast = (
        (lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=False)) if on_gpu else nullcontext
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=on_gpu, fused=on_gpu or None)

    def forward() -> None:
        with torch.no_grad(), autocast():
            model(images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()

    run = forward if method == "forward" else step
    model.train(method != "forward")
    if not on_gpu:
        run()
        times = [timed(run) for _ in range(options.rounds)]
        return row(options, backend, method, size, times, None, float("nan"))
    # Warm up where the graph is captured, so that gradients belong to that stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        eager = [timed(run) for _ in range(options.rounds)]
    peak = torch.cuda.max_memory_allocated() / 2**30
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    replays = [timed(graph.replay) for _ in range(options.rounds)]
    return row(options, backend, method, size, eager, replays, peak)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one run, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def row(options, backend, method, size, eager, replays, peak) -> dict:
    best = eager if replays is None else replays
    return {
        "model": PAIRS[options.scale][backend == VIT],
        "kernels": backend,
        "method": method,
        "img_size": size,
        "batch_size": options.batch_size,
        "eager_ms": statistics.median(eager),
        "graph_ms": None if replays is None else statistics.median(replays),
        "fastest_ms": min(best),
        "slowest_ms": max(best),
        "images_per_second": options.batch_size / statistics.median(best) * 1e3,
        "peak_gib": peak,
    }


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for kernels, method in dict.fromkeys((r["kernels"], r["method"]) for r in rows):
        points = [r for r in rows if (r["kernels"], r["method"]) == (kernels, method)]
        axes.plot(
            [r["img_size"] for r in points],
            [r["images_per_second"] for r in points],
            marker="o",
            label=f"{kernels} {method}",
        )
    axes.set(xlabel="image size in pixels", ylabel="images per second", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
