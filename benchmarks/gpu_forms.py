"""Effective weight or factored form: which is faster on this GPU?

    python benchmarks/gpu_forms.py

LoRA, DoRA and ProDiaL can multiply by the effective weight W', or by W and the low-rank branch
separately, as they do under dropout. Times replayed training steps of Vim-tiny, both forms in turns, for
several batch sizes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from step_cases import Case, StepRunner

from vimtune.adapters.lora import LoRARule
from vimtune.ops import resolved_backend

METHODS = ("lora", "dora", "prodial")


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_forms.py times CUDA graphs: no CUDA device here")
    backend = resolved_backend("cuda:0")
    name = torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}, backend {backend}, {options.img_size} px")
    print("batch  method   effective ms  factored ms  factored / effective (least to most)")
    for batch_size in options.batch_sizes:
        for method in options.methods:
            case = Case("tiny", backend, method, options.img_size, batch_size)
            effective, factored = StepRunner(backend, "cuda:0"), StepRunner(backend, "cuda:0")
            effective.prepare(case, capture=True)
            with factored_form():
                factored.prepare(case, capture=True)
            pairs = [(effective.visit(case, 0.05), factored.visit(case, 0.05)) for _ in range(options.rounds)]
            ratios = [theirs / ours for ours, theirs in pairs]
            ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{batch_size:5}  {method:8} {ours:12.2f} {theirs:12.2f}  {spread}", flush=True)
            effective.drop()
            factored.drop()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


@contextmanager
def factored_form() -> Iterator[None]:
    """Rules with a low-rank branch act on the input, as if they had dropout."""
    with patch.object(LoRARule, "acts_on_input", property(lambda rule: True)):
        yield


if __name__ == "__main__":
    main()
