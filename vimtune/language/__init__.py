"""Mamba and Mamba-2 language models of transformers, to be adapted like any other model.

    from vimtune.language import create_language_model, load_tokenizer

    model = create_language_model("state-spaces/mamba-130m-hf")
    vimtune.inject(model, "lora", targets="both", rank=16)

They stay what transformers makes them: class, configuration, keys and files are its own, so that `generate`,
`save_pretrained` and whatever else works with transformers' models works with them. Their mixers run on
`vimtune.ops` (`mixers.py`).

The table of models (`registry.py`) does without torch and transformers; everything else is imported on first
use and needs `pip install "vimtune[text]"`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import TYPE_CHECKING, Any

from vimtune.language.registry import LANGUAGE_MODELS, LanguageModelEntry, language_models

if TYPE_CHECKING:
    from vimtune.language.acceleration import accelerate
    from vimtune.language.classifier import PooledClassifier, pooled_classifier
    from vimtune.language.creation import create_language_model
    from vimtune.language.losses import greedy_hits, sequence_losses
    from vimtune.language.tokenizers import byte_tokenizer, check_tokenizer, load_tokenizer, tokenizer_digest

_HOMES = {
    "PooledClassifier": "classifier",
    "pooled_classifier": "classifier",
    "create_language_model": "creation",
    "greedy_hits": "losses",
    "sequence_losses": "losses",
    "accelerate": "acceleration",
    "byte_tokenizer": "tokenizers",
    "check_tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
    "tokenizer_digest": "tokenizers",
}
"""In which module the names are that need transformers."""

__all__ = [
    "LANGUAGE_MODELS",
    "LanguageModelEntry",
    "PooledClassifier",
    "accelerate",
    "byte_tokenizer",
    "check_tokenizer",
    "create_language_model",
    "greedy_hits",
    "language_models",
    "load_tokenizer",
    "pooled_classifier",
    "require_transformers",
    "sequence_losses",
    "tokenizer_digest",
]

MIN_TRANSFORMERS = (5, 21)
"""Lowest version of transformers whose cache hands out its states by `get_conv_state` and
`get_recurrent_state`."""


def require_transformers() -> None:
    """Make sure that language models can be used here.

    Raises:
        ValueError: transformers is not installed, or too old; the message says what to install.
    """
    lowest = ".".join(map(str, MIN_TRANSFORMERS))
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found = "it is not installed"
    else:
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= MIN_TRANSFORMERS:
            return
        found = f"{version} is installed"
    raise ValueError(
        f'language models need transformers {lowest} or newer, and {found}: pip install "vimtune[text]"'
    )


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vimtune.language' has no attribute {name!r}")
    require_transformers()
    return getattr(importlib.import_module(f"vimtune.language.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """All public names, imported yet or not."""
    return sorted({*globals(), *__all__})
