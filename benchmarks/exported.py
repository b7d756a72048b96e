"""Write a model for other programs and time what was written beside the model itself.

    python benchmarks/exported.py                                              # Vim-tiny, 224 px
    python benchmarks/exported.py --model vim_nano_patch8_64 --batch-sizes 1 32

A LoRA adapter that is not at its start is merged on the way, as in use. Printed are, for `.onnx` (run by
onnxruntime) and `.pt2` (loaded by torch.export), how long writing with its check took, the size of the file
as a multiple of the weights in fp32, and the largest difference of a logit. Then PyTorch with vimtune's
kernels, PyTorch with its own operations and the two files compute the same batch in turns, so that a machine
that gets slower meanwhile slows all of them: medians over the rounds, with the fastest and slowest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from turns import describe_machine, take_turns

import vimtune
from vimtune import ops
from vimtune.export.formats import FORMATS, format_of


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        model, source, base = write_adapter(options.model, Path(folder))
        jobs: dict[str, Callable[[Tensor], Tensor]] = {
            "PyTorch, vimtune's kernels": lambda images: forward(model, images, "auto"),
            "PyTorch, its own operations": lambda images: forward(model, images, "torch"),
        }
        for suffix in FORMATS:
            path = Path(folder) / f"model{suffix}"
            start = time.perf_counter()
            exported = vimtune.export_to_file(source, path, checkpoint=base)
            seconds = time.perf_counter() - start
            times = exported.size / exported.weights
            print(
                f"{suffix:6} written in {seconds:.1f} s, {times:.2f} times the weights "
                f"({exported.size / 1e6:.1f} MB), largest difference of a logit {exported.max_error:.1e}"
            )
            jobs[suffix] = format_of(path).open(path)
        for batch_size in options.batch_sizes:
            measure(jobs, torch.randn(batch_size, *model.pretrained_cfg["input_size"]), options.rounds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def write_adapter(name: str, folder: Path) -> tuple[nn.Module, Path, Path]:
    """A merged model with random weights, the adapter file, and the base weights, of which it was merged."""
    model = timm.create_model(name, num_classes=102).eval()
    base, adapter = folder / "base.pth", folder / "adapter.safetensors"
    torch.save(model.state_dict(), base)
    vimtune.inject(model, "lora")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    vimtune.save_adapter(model, adapter, classes=[f"class {number}" for number in range(102)])
    return vimtune.merge(model), adapter, base


def forward(model: nn.Module, images: Tensor, backend: str) -> Tensor:
    """The logits of a batch by operations of `backend`."""
    with torch.no_grad(), ops.use_backend(backend):
        return model(images)


def measure(jobs: dict[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> None:
    """Print the times for an image of jobs that take turns with the same batch."""
    prepared = {name: partial(job, images) for name, job in jobs.items()}
    # That of the wall, because onnxruntime has threads of its own.
    times = take_turns(prepared, torch.device("cpu"), rounds, clock=time.perf_counter)
    print(f"ms an image, batch {len(images)}:")
    for name, of_batches in times.items():
        own = [each / len(images) for each in of_batches]
        print(f"  {name:28} {statistics.median(own):8.1f} ({min(own):.1f} to {max(own):.1f})")


if __name__ == "__main__":
    main()
