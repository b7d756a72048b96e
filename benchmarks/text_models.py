"""Time a language model on the CPU, with our mixers and with transformers' own, in one run.

    python benchmarks/text_models.py                           # 4 layers of mamba-130m, 4 x 256 tokens
    python benchmarks/text_models.py --model mamba2-130m --threads 1
    python benchmarks/text_models.py --loss                    # memory and time of the loss, 50,280 tokens

transformers' own mixers run without the kernels of mamba_ssm, which need a GPU. The layers alone are
timed, without the head, which is the same for both: a forward pass, the same with a cache (prefill), forward
and backward with all weights trained, and one decoded token. Both take turns, so that a machine that gets
slower meanwhile slows both; medians over the rounds, with the fastest and slowest. With --loss two processes
compute the loss of a batch and its gradients from logits of all tokens at once and in chunks, and say how
much memory they needed at most.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from vimtune.language import accelerate, create_language_model, sequence_losses
from vimtune.language.creation import MODELS
from vimtune.machine import processor_name

OURS, THEIRS = "vimtune", "transformers"
SLOW = ("forward + backward",)
"""Jobs for which transformers' own mixers take minutes; they have their own number of rounds."""


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.loss_way:
        print(measure_loss(options))
        return
    load = f"load {os.getloadavg()[0]:.1f}"
    print(
        f"{processor_name()}, {options.threads} threads, {load}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}"
    )
    if options.loss:
        for way in ("all tokens at once", "chunks"):
            command = [sys.executable, __file__, *sys.argv[1:], "--loss-way", way]
            print(
                f"{way}: {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"
            )
        return
    ids = torch.randint(50_000, (options.batch_size, options.tokens))
    ours = create_language_model(options.model, pretrained=False, num_hidden_layers=options.layers)
    theirs = MODELS[ours.config.model_type](ours.config)
    theirs.load_state_dict(ours.state_dict())
    accelerate(ours, options.backend)
    models = {OURS: ours, THEIRS: theirs.eval()}
    print(f"{options.model}, {options.layers} layers, {options.batch_size} x {options.tokens} tokens, fp32")
    report(measure(models, ids, options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mamba-130m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of transformers' backward pass")
    parser.add_argument("--decoded", type=int, default=16, help="tokens that are decoded in a round")
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--loss-way", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    models: dict[str, Any], ids: torch.Tensor, options: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every job of both models in every round."""
    jobs: dict[str, Callable[[Any], float]] = {
        "forward": lambda model: timed(lambda: forward(model, ids, cache=False)),
        "prefill": lambda model: timed(lambda: forward(model, ids, cache=True)),
        "decoding a token": lambda model: decode(model, ids, options.decoded),
        "forward + backward": lambda model: timed(lambda: step(model, ids)),
    }
    for job in ("forward", "decoding a token", "forward + backward"):  # compiles what is compiled
        jobs[job](models[OURS])
    times: dict[tuple[str, str], list[float]] = {(job, name): [] for job in jobs for name in models}
    for turn in range(options.rounds):
        for job, run in jobs.items():
            for name, model in models.items():
                if name == OURS or job not in SLOW or turn < options.slow_rounds:
                    times[job, name].append(run(model))
    return times


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor, cache: bool) -> Any:
    """Hidden states of all tokens."""
    return model.backbone(ids, use_cache=cache)


def step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward pass; every weight gets a gradient."""
    model.backbone.zero_grad()
    model.backbone(ids, use_cache=False)[0].square().mean().backward()


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, count: int) -> float:
    """Seconds for one token of each sequence behind a prompt of 8, mean of `count`."""
    cache = model.backbone(ids[:, :8], use_cache=True)[1]
    start = time.perf_counter()
    for index in range(8, 8 + count):
        model.backbone(ids[:, index : index + 1], None, cache, True)
    return (time.perf_counter() - start) / count


def measure_loss(options: argparse.Namespace) -> str:
    """Peak memory and time of the loss and its gradient, frozen weights; without the layers."""
    model = create_language_model(options.model, pretrained=False, num_hidden_layers=1)
    hidden = torch.randn(options.batch_size, options.tokens, model.config.hidden_size, requires_grad=True)
    labels = torch.randint(50_000, hidden.shape[:2])
    model.requires_grad_(False)
    model.backbone.forward = lambda *_, **__: (hidden,)

    def compute() -> torch.Tensor:
        if options.loss_way == "chunks":
            return sequence_losses(model, labels, labels).sum()
        logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(lambda: compute().backward())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{peak / 2**10:.0f} MiB more than before, {seconds:.2f} s"


def report(times: dict[tuple[str, str], list[float]]) -> None:
    """A table of both, by job."""
    print(f"\n| | {OURS}, s | {THEIRS}, s | ratio |\n|---|---|---|---|")
    for job in dict.fromkeys(job for job, _ in times):
        medians = [statistics.median(times[job, name]) for name in (OURS, THEIRS)]
        cells = [shown(times[job, name]) for name in (OURS, THEIRS)]
        print(f"| {job} | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:.1f} |")


def shown(seconds: list[float]) -> str:
    """The median, with the fastest and slowest run."""
    return f"{statistics.median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})"


if __name__ == "__main__":
    main()
