"""Train, prefill and decode a language model on a GPU, with our mixers and with transformers' own.

    python benchmarks/gpu_text.py                                  # mamba-130m, 8 x 512 tokens
    python benchmarks/gpu_text.py --model mamba2-130m --methods lora full

transformers' own mixers run on the kernels of mamba_ssm and causal_conv1d, which have to be installed. A step
of training is forward, loss of all tokens and backward under bf16 autocast, adapters by vimtune in both; ours
computes the loss in chunks, transformers' model its own. Ours is timed started from Python and replayed as a
CUDA graph. All take turns; medians over the rounds, with the fastest and slowest, and the peak of GPU memory
above that of the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import vimtune
from vimtune.language import create_language_model, sequence_losses
from vimtune.language.creation import MODELS


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.model}, "
        f"{options.batch_size} x {options.tokens} tokens, bf16 autocast"
    )
    rows = [train_rows(options, method) for method in options.methods]
    rows.append(generation_rows(options))
    found = {key: value for row in rows for key, value in row.items()}
    print("\n| | tokens/s | peak memory above the model, MiB |\n|---|---|---|")
    for name, result in found.items():
        rates = result["rates"]
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        print(f"| {name} | {spread} | {result['memory']:,.0f} |")
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1), encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mamba-130m")
    parser.add_argument("--methods", nargs="+", default=["lora", "prodial"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt that is read")
    parser.add_argument("--decoded", type=int, default=32, help="tokens that are decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of training in a round")
    parser.add_argument("--output", help="also write what was measured to this file, as JSON")
    return parser.parse_args()


def build(options: argparse.Namespace, ours: bool, method: str | None) -> Any:
    """A model with random weights and, if asked for, an adapter."""
    torch.manual_seed(0)
    model: Any = create_language_model(options.model, pretrained=False, device="cuda")
    if not ours:
        plain = MODELS[model.config.model_type](model.config).cuda()
        plain.load_state_dict(model.state_dict())
        model = plain
    if method is not None:
        vimtune.inject(model, method)
    return model.train(method is not None)


def train_rows(options: argparse.Namespace, method: str) -> dict[str, dict[str, Any]]:
    """Rates and memory of training by each way."""
    ids = torch.randint(50_000, (options.batch_size, options.tokens), device="cuda")
    ways: dict[str, tuple[bool, bool]] = {
        "transformers": (False, False),
        "vimtune": (True, False),
        "vimtune, CUDA graph": (True, True),
    }
    found = {f"{method}, {way}": {"rates": [], "memory": 0.0} for way in ways}
    runs: dict[str, Callable[[], object]] = {}
    for way, (ours, graph) in ways.items():
        model = build(options, ours, method)
        occupied = torch.cuda.memory_allocated()
        step = training_step(model, ids, ours)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        found[f"{method}, {way}"]["memory"] = (torch.cuda.max_memory_allocated() - occupied) / 2**20
        runs[way] = captured(step) if graph else step
    for _ in range(options.rounds):
        for way, run in runs.items():
            seconds = timed(run, options.steps) / options.steps
            found[f"{method}, {way}"]["rates"].append(ids.numel() / seconds)
    return found


def training_step(model: Any, ids: torch.Tensor, ours: bool) -> Callable[[], None]:
    """Forward, loss and backward, which leave gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            if ours:
                loss = sequence_losses(model, ids, ids).sum() / ids.numel()
            else:
                loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def generation_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rates of reading a prompt and of decoding."""
    ids = torch.randint(50_000, (options.batch_size, options.prompt), device="cuda")
    models = {"transformers": build(options, False, None), "vimtune": build(options, True, None)}
    found: dict[str, dict[str, Any]] = {}
    for turn in range(options.rounds + 1):
        for way, model in models.items():
            torch.cuda.synchronize()
            occupied = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                read = timed(lambda model=model: model(ids, use_cache=True, logits_to_keep=1), 1)
                memory = (torch.cuda.max_memory_allocated() - occupied) / 2**20
                cache = model(ids[:, :16], use_cache=True).cache
                written = timed(
                    lambda model=model, cache=cache: model(ids[:, :1], cache=cache), options.decoded
                )
            if turn == 0:  # compiles what is compiled
                found |= {f"{job}, {way}": {"rates": [], "memory": 0.0} for job in ("prefill", "decoding")}
                continue
            found[f"prefill, {way}"]["rates"].append(ids.numel() / read)
            found[f"prefill, {way}"]["memory"] = memory
            found[f"decoding, {way}"]["rates"].append(options.batch_size * options.decoded / written)
    return found


def timed(run: Callable[[], object], times: int) -> float:
    """Seconds that so many calls take on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
