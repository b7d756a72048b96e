"""`vimtune merge`: fold an adapter into its base weights and prove that nothing changed.

What is written belongs to the task that the adapter was trained on (`Task.merge`): a file for images, a
folder for texts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vimtune import parsers
from vimtune.adapters import read_adapter_info
from vimtune.console import build_console, print_line
from vimtune.models.merged import is_merged_file
from vimtune.runtime.device import resolve_device
from vimtune.tasks.merging import Merged, Precision
from vimtune.tasks.origin import adapter_path, given_base, task_of
from vimtune.text import quote


def merge_to_file(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
    precision: Precision = "fp32",
) -> Merged:
    """Write merged weights, read them back, and check that they compute what base and adapter do.

    Args:
        adapter: the file, or the folder of a run.
        output: what is written: a .safetensors file for images (see `vimtune.models.merged`), a folder that
            plain transformers loads for texts.
        checkpoint: base weights of the adapter; those it was trained on if None.
        model: the base model of an adapter of texts, where it is in another place now.
        tokenizer: the same of its tokenizer.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: merge although the base weights differ from those that the adapter was trained on.
        precision: type of the weights that are written, "fp32", "fp16" or "bf16".

    Raises:
        ValueError: the adapter cannot be loaded, or the result cannot be written there.
        MergeError: the logits differ by more than rounding explains; nothing is left behind.
    """
    path = adapter_path(adapter)
    if is_merged_file(path):
        raise ValueError(f"{quote(str(path))} is merged already: there is no adapter in it")
    task = task_of(read_adapter_info(path))
    base = given_base(checkpoint, model, tokenizer)
    target = parsers.given_path("output", output, "the file or folder to write")
    return task.merge(path, target, base, resolve_device(device), backend, force, precision)


def run_merge(*, adapter: Path, output: Path, **options: Any) -> int:
    """`vimtune merge`: write the weights, print the proof. Returns the exit code.

    Args:
        adapter, output, **options: those of `merge_to_file`.
    """
    merged = merge_to_file(adapter, output, **options)
    method, proof, console = read_adapter_info(adapter_path(adapter)).method, merged.proof, build_console()
    print_line(console, f"{merged.model} with {method} merged into {output}")
    print_line(
        console,
        f"maximum logit error {proof.max_error:.1e} on {proof.inputs} (largest logit {proof.max_logit:.1f}), "
        "what was written against base + adapter",
    )
    print_line(console, "load it with:")
    for line in merged.loading_code.splitlines():
        print_line(console, f"    {line}", wrap=False)
    return 0
