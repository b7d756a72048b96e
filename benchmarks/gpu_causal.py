"""Time the inside of Mamba's mixer, one direction, against other ways to compute it and against Vim's mixer.

    python benchmarks/gpu_causal.py --output results             # B 8; 512 and 2048 tokens; E 1536 and 2048
    python benchmarks/gpu_causal.py --tokens 256 --inner 4096 --kernels nvrtc triton
    python benchmarks/gpu_causal.py --profile                    # and what each kernel of nvrtc takes

N is 16, R is E / 32, K is 4; activations are bf16 and weights fp32. What is timed: `causal_mixer` in the
backends' own kernels (nvrtc, triton) and composed of the convolution and the scan (composed-triton, and
composed-cuda with the kernels of mamba-ssm and causal-conv1d), and `bidirectional_scan` in nvrtc, which does
the same twice. mamba_inner_fn of mamba-ssm has out_proj in it: against it stands nvrtc-out_proj, which is
nvrtc with this product behind it. Modes: the forward alone; forward and backward with frozen weights, which
is the gradient of xz; forward and backward with all weights trained.

Times are replays of CUDA graphs: median, fastest and slowest round. All cases of a size are recorded first
and then replayed in turns, so that a change of the clock meets all of them. `--output` gets gpu_causal.json,
rewritten after every size.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_kernels import recorded
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vimtune.machine import installed_version
from vimtune.ops import DirectionWeights, bidirectional_scan, causal_mixer
from vimtune.ops.mixer import one_direction

BOTH, MAMBA = "bidirectional", "mamba_inner_fn"
WITH_OUT_PROJ = ("nvrtc-out_proj", MAMBA)
KERNELS = ("nvrtc", "triton", "composed-triton", "composed-cuda", *WITH_OUT_PROJ, BOTH)
MODES = ("forward", "frozen", "trained")
STATES, WIDTH = 16, 4
REPEATS = 5
"""Calls in a graph."""


class Size(NamedTuple):
    """What all cases of a table have in common."""

    batch: int
    tokens: int
    inner: int


class Inputs(NamedTuple):
    """Tensors of one case. All but `grad` are leaves, and those that are trained want gradients."""

    xz: Tensor
    """(B, L, 2 E), or for mamba-ssm (B, 2 E, L) in the layout that its in_proj gives it."""
    directions: list[DirectionWeights]
    out_proj: Tensor
    """(E / 2, E)"""
    grad: Tensor
    """Gradient of the result."""


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_causal.py times GPU kernels: no CUDA device here")
    packages = {name: installed_version(name) for name in ("torch", "triton", "mamba-ssm", "causal-conv1d")}
    report: dict[str, Any] = {"machine": torch.cuda.get_device_name(), "packages": packages, "rows": []}
    print(report["machine"], packages)
    for tokens, inner in itertools.product(options.tokens, options.inner):
        size = Size(options.batch_size, tokens, inner)
        report["rows"] += measure(size, options)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "gpu_causal.json").write_text(json.dumps(report, indent=1) + "\n")
        if options.profile:
            print_profile(size)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--inner", type=int, nargs="+", default=[1536, 2048])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel of nvrtc")
    parser.add_argument("--output", type=Path, help="folder for gpu_causal.json")
    return parser.parse_args()


def measure(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all cases of a size and print their table; a case that does not run has its error in its row."""
    rows: list[dict[str, Any]] = []
    replays: list[Callable[[], float]] = []
    for mode, kernels in itertools.product(options.modes, options.kernels):
        row = {**size._asdict(), "mode": mode, "kernels": kernels}
        rows.append(row)
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            replay = recorded(case(size, mode, kernels), REPEATS)
            replay()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["microseconds"] = []
        replays.append(replay)
    timed = [row for row in rows if "microseconds" in row]
    for _ in range(options.rounds):
        for row, replay in zip(timed, replays, strict=True):
            row["microseconds"].append(replay())
    print_table(size, rows)
    return rows


def case(size: Size, mode: str, kernels: str) -> Callable[[], object]:
    """What is recorded: a forward pass, or one with its backward pass behind it."""
    inputs = build(size, mode == "trained", kernels)
    forward = partial(run, kernels, inputs)
    if mode == "forward":
        return torch.no_grad()(forward)
    tensors = [inputs.xz, *itertools.chain.from_iterable(inputs.directions)]
    if kernels in WITH_OUT_PROJ:
        tensors.append(inputs.out_proj)
    wanted = [leaf for leaf in tensors if leaf is not None and leaf.requires_grad]

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return torch.autograd.grad(out, wanted, inputs.grad[..., : out.shape[-1]])

    return step


def build(size: Size, trained: bool, kernels: str) -> Inputs:
    """Random activations, and weights in the ranges of trained ones."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, inner = size
    rank = inner // 32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    def direction() -> DirectionWeights:
        A_log = torch.arange(1, STATES + 1).float().log().repeat(inner, 1).cuda()
        tensors = [
            normal(inner, WIDTH) / 2,
            normal(inner) / 2,
            normal(rank + 2 * STATES, inner) / inner**0.5,
            normal(inner, rank) / rank**0.5,
            normal(inner) - 3,
            A_log + 0.1 * normal(inner, STATES),
            normal(inner),
        ]
        return DirectionWeights(*(tensor.requires_grad_(trained) for tensor in tensors))

    xz = normal(batch, tokens, 2 * inner).bfloat16()
    if kernels == MAMBA:
        xz = xz.permute(2, 0, 1).contiguous().transpose(0, 1)
    return Inputs(
        xz.requires_grad_(),
        [direction() for _ in range(2 if kernels == BOTH else 1)],
        (normal(inner // 2, inner) / inner**0.5).requires_grad_(trained),
        normal(batch, tokens, inner).bfloat16(),
    )


def run(kernels: str, inputs: Inputs) -> Tensor:
    """The forward pass of a case."""
    xz, weights = inputs.xz, inputs.directions[0]
    if kernels == BOTH:
        return bidirectional_scan(xz, *inputs.directions, backend="nvrtc")
    if kernels == MAMBA:
        return run_mamba(inputs)
    if kernels.startswith("composed-"):
        return one_direction(*xz.chunk(2, dim=-1), weights, False, kernels.removeprefix("composed-"))
    out = causal_mixer(xz, weights, kernels.removesuffix("-out_proj"))
    return F.linear(out, inputs.out_proj.bfloat16()) if kernels in WITH_OUT_PROJ else out


def run_mamba(inputs: Inputs) -> Tensor:
    """The forward pass of mamba-ssm."""
    weights = inputs.directions[0]
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    with torch.autocast("cuda", torch.bfloat16):
        result: Tensor = interface.mamba_inner_fn(
            inputs.xz, weights.conv_weight[:, None], weights.conv_bias, weights.x_proj, weights.dt_proj,
            inputs.out_proj, None, -torch.exp(weights.A_log), None, None, weights.D,
            delta_bias=weights.dt_bias, delta_softplus=True,
        )  # fmt: skip
    return result


def print_table(size: Size, rows: list[dict[str, Any]]) -> None:
    """One line for each case of a size."""
    rank = size.inner // 32
    print(f"\nB {size.batch}, L {size.tokens}, E {size.inner}, N {STATES}, R {rank}, bf16; microseconds")
    for row in rows:
        label = f"  {row['mode']:8} {row['kernels']:16}"
        if "error" in row:
            print(f"{label} {row['error']}")
            continue
        times = row["microseconds"]
        middle = f"{statistics.median(times):8.0f} ({min(times):.0f} to {max(times):.0f})"
        print(f"{label} {middle:26} {row['peak_mib']:7.0f} MiB")


def print_profile(size: Size) -> None:
    """What each kernel of nvrtc takes in a step with frozen and in one with trained weights."""
    for mode in MODES[1:]:
        step = case(size, mode, "nvrtc")
        step()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(REPEATS):
                step()
            torch.cuda.synchronize()
        print(f"  kernels of a step, {mode}:")
        for event in sorted(profiler.key_averages(), key=lambda event: -event.device_time_total):
            if event.device_time_total:
                print(f"    {event.key[:60]:60} {event.device_time_total / REPEATS:8.0f} us")


if __name__ == "__main__":
    main()
