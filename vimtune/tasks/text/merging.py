"""Merge an adapter of a language model into a folder that plain transformers loads, and prove it.

Shape letters: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from vimtune import adapters
from vimtune.adapters import load_adapter, read_adapter_info
from vimtune.ops import use_backend
from vimtune.output import write_folder
from vimtune.tasks.merging import Merged, Precision, dtype_of, prove
from vimtune.tasks.text.job import settings_of
from vimtune.tasks.text.models import language_model, open_tokenizer
from vimtune.tasks.text.predictor import recipe_for
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask

SHAPE = (2, 48)
"""Rows and tokens of the random text on which the merged model has to compute what base and adapter do."""


def merge_texts(
    task: TextTask,
    adapter: Path,
    output: Path,
    base: Mapping[str, Any],
    device: torch.device,
    backend: str,
    force: bool,
    precision: Precision,
) -> Merged:
    """Write the merged model and its tokenizer; the arguments are those of `Task.merge`.

    The folder is read back by transformers alone and has to give the logits of base plus adapter; otherwise
    nothing is left behind.

    Raises:
        ValueError: the adapter has a classification head, which transformers' class lacks, does not fit, or
            the folder cannot be written.
        MergeError: the logits differ by more than rounding explains.
    """
    if task.head == "classifier":
        raise ValueError(
            f"{quote(str(adapter))} has a classification head, for which transformers' language models have "
            "no place: use vimtune predict and evaluate, or vimtune.merge from Python"
        )
    recipe = recipe_for(task, adapter, base)
    _, backbone = settings_of(recipe)
    model = language_model(recipe, backbone)
    load_adapter(model, adapter, force=force)
    tokenizer = open_tokenizer(backbone, model, read_adapter_info(adapter), force)
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, SHAPE, generator=generator).to(device)
    with torch.no_grad(), use_backend(backend):
        expected = model(tokens, use_cache=False).logits
    adapters.merge(model).to(dtype_of(precision))
    results: list[Merged] = []

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        with torch.no_grad():
            logits = plain(tokens).logits
        proof = prove(logits, expected, f"{SHAPE[0]} x {SHAPE[1]} random tokens", precision)
        call = f"transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})"
        results.append(Merged(backbone.model, proof, f"import transformers\nmodel = {call}"))

    write_folder(output, write)
    return results[0]
