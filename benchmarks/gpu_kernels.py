"""Check the mixer's GPU kernels against the definition, and time them kernel by kernel.

    python benchmarks/gpu_kernels.py                               # Vim-tiny, 224 px, batch 128
    python benchmarks/gpu_kernels.py --tokens 65 --batch-size 1024
    python benchmarks/gpu_kernels.py --backends triton --sweep     # all tilings of Triton's scan

Times are replays of a CUDA graph (a Python launch takes longer than some kernels): median, fastest and
slowest. The floor is the larger of two times: the special-function unit's for one exp2 per state, step
and pass, and the memory's for the tensors that must be read and written at the measured copy rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vimtune.ops import DirectionWeights, bidirectional_scan
from vimtune.ops.nvrtc import mixer as nvrtc_mixer
from vimtune.ops.triton import launch
from vimtune.ops.triton import mixer as triton_mixer

MIXERS = {"nvrtc": nvrtc_mixer, "triton": triton_mixer}
SFU_PER_CLOCK = 16  # per multiprocessor
FORWARD_TILINGS = [(32, 4), (32, 8), (64, 4), (64, 8)]  # channels, steps
BACKWARD_TILINGS = [(32, 2, 64), (32, 4, 64), (32, 4, 32), (64, 2, 64)]  # channels, steps, chunk


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_kernels.py times GPU kernels: no CUDA device here")
    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}")
    check(options)
    shape = f"B {options.batch_size}, L {options.tokens}, E {options.inner}, N {options.states}"
    print(f"\n{shape}, R {options.rank}, bf16, frozen weights")
    exps = 2 * options.batch_size * options.tokens * options.inner * options.states
    clock = properties.clock_rate * 1e3 if hasattr(properties, "clock_rate") else 1.98e9
    exp_time = exps / (SFU_PER_CLOCK * properties.multi_processor_count * clock) * 1e6
    row = 2 * options.batch_size * options.tokens * options.inner
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s; one pass of exponentials takes at least {exp_time:.0f} us")
    print(f"forward floor: memory {3 * row / rate * 1e6:.0f} us, exponentials {exp_time:.0f} us")
    print(f"backward floor: memory {5 * row / rate * 1e6:.0f} us, exponentials {2 * exp_time:.0f} us")

    for backend in options.backends:
        measure(options, backend)


def measure(options: argparse.Namespace, backend: str) -> None:
    xz, grad, weights = inputs(options, torch.bfloat16)
    mixer = MIXERS[backend]

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return mixer.forward(xz, weights, True)

    def backward(needed: bool) -> Callable[[], object]:
        results, needs = forward(), [[needed] * len(weights[0])] * 2
        return lambda: mixer.backward(grad, xz, results, weights, True, needs)

    print(f"\n{backend}: forward {graph_time(forward)}")
    print(f"{backend}: backward, frozen weights {graph_time(backward(False))}")
    print(f"{backend}: backward, trained weights {graph_time(backward(True))}")
    if options.sweep and backend == "triton":
        usual = launch.TILING
        for channels, steps in FORWARD_TILINGS:
            launch.TILING = dataclasses.replace(usual, forward_channels=channels, forward_steps=steps)
            print(f"forward  {channels:3} channels, {steps} steps: {graph_time(forward)}")
        for channels, steps, chunk in BACKWARD_TILINGS:
            launch.TILING = dataclasses.replace(
                usual, backward_channels=channels, backward_steps=steps, chunk=chunk
            )
            time = graph_time(backward(False))
            print(f"backward {channels:3} channels, {steps} steps, chunk {chunk}: {time}")
        launch.TILING = usual
    step = backward(False)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            forward()
            step()
        torch.cuda.synchronize()
    for event in sorted(profiler.key_averages(), key=lambda event: -event.device_time_total):
        if event.device_time_total:
            print(f"  {event.key[:60]:60} {event.device_time_total / 5:8.0f} us")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument(
        "--backends", nargs="+", choices=MIXERS, default=list(MIXERS), help="whose kernels to time"
    )
    parser.add_argument("--sweep", action="store_true", help="time every tiling of the scan")
    return parser.parse_args()


def inputs(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[DirectionWeights]]:
    """Random xz, output gradient and the weights of both directions, in trained weights' ranges."""
    generator = torch.Generator().manual_seed(0)
    inner, states, rank = options.inner, options.states, options.rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    def direction() -> DirectionWeights:
        A_log = torch.arange(1, states + 1).float().log().repeat(inner, 1).cuda()
        projections = [normal(rank + 2 * states, inner) / inner**0.5, normal(inner, rank) / rank**0.5]
        return DirectionWeights(
            *(normal(inner, 4) / 2, normal(inner) / 2, *projections, normal(inner) - 2),
            *(A_log + 0.1 * normal(inner, states), normal(inner)),
        )

    xz = normal(options.batch_size, options.tokens, 2 * inner).to(dtype)
    return xz, normal(options.batch_size, options.tokens, inner).to(dtype), [direction(), direction()]


def check(options: argparse.Namespace) -> None:
    """Print the largest deviation of the output and of any gradient, relative to the largest value."""
    small = argparse.Namespace(**{**vars(options), "batch_size": 2})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        xz, grad, weights = inputs(small, dtype)
        exact = evaluate(partial(bidirectional_scan, backend="reference"), torch.float64, xz, grad, weights)
        for backend in options.backends:
            found = evaluate(partial(bidirectional_scan, backend=backend), dtype, xz, grad, weights)
            errors = [
                ((actual.double() - expected).abs().max() / expected.abs().max()).item()
                for expected, actual in zip(exact, found, strict=True)
            ]
            print(
                f"{backend}, {dtype}: out {errors[0]:.1e}, d(xz) {errors[1]:.1e}, "
                f"weight gradients {max(errors[2:]):.1e}"
            )


def evaluate(
    function: Callable[..., Tensor],
    kind: torch.dtype,
    xz: Tensor,
    grad: Tensor,
    weights: list[DirectionWeights],
) -> list[Tensor]:
    """Output and all gradients of `function` with activations of dtype `kind`."""
    wide = torch.promote_types(kind, torch.float32)
    leaves = [xz.to(kind), *(weight.to(wide) for own in weights for weight in own if weight is not None)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(leaves[0], DirectionWeights(*leaves[1:8]), DirectionWeights(*leaves[8:]))
    return [out, *torch.autograd.grad(out, leaves, grad.to(kind))]


def copy_rate() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(replays(lambda: target.copy_(source), 2)) / 1e6
    return 2 * source.numel() * 4 / seconds


def graph_time(function: Callable[[], object]) -> str:
    times = replays(function, 5)
    return f"{statistics.median(times):.0f} us ({min(times):.0f} to {max(times):.0f})"


def replays(function: Callable[[], object], repeats: int, rounds: int = 7) -> list[float]:
    """Microseconds of one call, from graphs of `repeats` calls."""
    replay = recorded(function, repeats)
    replay()
    return [replay() for _ in range(rounds)]


def recorded(function: Callable[[], object], repeats: int) -> Callable[[], float]:
    """A function that replays a graph of `repeats` calls and returns the microseconds of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()

    def replay(reads: object = function) -> float:  # The graph reads tensors that only the function keeps.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats * 1e3

    return replay


if __name__ == "__main__":
    main()
