"""Time inference of a model with affix tokens, of the same model after folding them, and of the plain one.

    python benchmarks/folded.py                                             # Vim-tiny, 224 px, on the CPU
    python benchmarks/folded.py --device cuda --batch-size 128 --amp bf16   # eager and as a CUDA graph

The three take turns, so that a machine that gets slower meanwhile slows all of them. Printed are medians over
the rounds with the fastest and slowest (on a CPU its time in this process, which the load of others lengthens
less), the median of the ratio to the plain model in the same round, and the largest difference between the
logits of the first two.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
from torch import Tensor, nn
from turns import describe_machine, take_turns

import vimtune
from vimtune import ops


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    plain = timm.create_model(options.model, num_classes=102).eval().to(device)
    adapted = vimtune.inject(copy.deepcopy(plain), "affix", num_tokens=options.num_tokens).eval()
    models = {"tokens": adapted, "folded": vimtune.merge(copy.deepcopy(adapted)), "plain": plain}
    size = plain.pretrained_cfg["input_size"][-1]
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    print(describe_machine(device))
    amp = options.amp or "fp32"
    print(
        f"{options.model}, affix of {options.num_tokens} tokens, {amp}, batch {options.batch_size}, {size} px"
    )
    with ops.use_backend(options.backend):
        jobs = {
            name: (lambda model=model: forward(model, images, options.amp)) for name, model in models.items()
        }
        difference = (jobs["tokens"]() - jobs["folded"]()).abs().max().item()
        measure("", jobs, device, options.rounds)
        if device.type == "cuda":
            measure(
                " (CUDA graph)", {name: recorded(job) for name, job in jobs.items()}, device, options.rounds
            )
    print(f"largest difference of the logits, tokens against folded: {difference:.1e}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--num-tokens", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="default: fp32")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def forward(model: nn.Module, images: Tensor, amp: str | None) -> Tensor:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp or "")
    context = nullcontext() if dtype is None else torch.autocast(images.device.type, dtype)
    with torch.no_grad(), context:
        return model(images).float()


def recorded(job: Callable[[], Tensor]) -> Callable[[], None]:
    """The job as a CUDA graph that is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        job()
    return graph.replay


def measure(label: str, jobs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> None:
    """Print the times of jobs that take turns."""
    times = take_turns(jobs, device, rounds)
    for name, own in times.items():
        ratio = statistics.median(one / plain for one, plain in zip(own, times["plain"], strict=True))
        span = f"{statistics.median(own):9.2f} ms ({min(own):.2f} to {max(own):.2f})"
        print(f"  {name + label:22} {span:34} {ratio:.3f} of plain")


if __name__ == "__main__":
    main()
