"""The table of language models that are known by name. Nothing here imports torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vimtune.registry import Registry

Family = Literal["mamba", "mamba2"]
"""The `model_type` of transformers' configurations."""

NEOX_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Hub id of the tokenizer with which the state-spaces models were trained (Gu & Dao 2023, section 4.2)."""


@dataclass(frozen=True)
class LanguageModelEntry:
    """What is known about a language model before it is created."""

    name: str
    """Its name here."""
    summary: str
    """One line for `--list`."""
    family: Family
    """Which of transformers' two architectures it is."""
    sizes: Mapping[str, Any]
    """Fields of transformers' configuration in which it differs from the defaults of its family."""
    hub_id: str | None = None
    """Repository of its weights on the Hugging Face hub; None for a model that always starts from random
    ones."""
    tokenizer: str | None = None
    """Repository of its tokenizer; None for the tokenizer of single bytes (`byte_tokenizer`)."""
    origin: str = "vimtune.language.registry"
    """Where it is defined: another definition may not take its name, a new version of the same may."""


LANGUAGE_MODELS: Registry[LanguageModelEntry] = Registry("language model")
"""All language models by name."""

# (name, parameters, width, layers, repository) of the published models (Gu & Dao 2023, appendix E.2).
_MAMBA = (
    ("mamba-130m", "129 M", 768, 24, "state-spaces/mamba-130m-hf"),
    ("mamba-370m", "372 M", 1024, 48, "state-spaces/mamba-370m-hf"),
    ("mamba-790m", "793 M", 1536, 48, "state-spaces/mamba-790m-hf"),
    ("mamba-1.4b", "1.4 B", 2048, 48, "state-spaces/mamba-1.4b-hf"),
    ("mamba-2.8b", "2.8 B", 2560, 64, "state-spaces/mamba-2.8b-hf"),
)
# The same of Mamba-2 (Dao & Gu 2024, appendix D), published in the original layout.
_MAMBA2 = (
    ("mamba2-130m", "129 M", 768, 24, "state-spaces/mamba2-130m"),
    ("mamba2-370m", "368 M", 1024, 48, "state-spaces/mamba2-370m"),
    ("mamba2-780m", "780 M", 1536, 48, "state-spaces/mamba2-780m"),
    ("mamba2-1.3b", "1.3 B", 2048, 48, "state-spaces/mamba2-1.3b"),
    ("mamba2-2.7b", "2.7 B", 2560, 64, "state-spaces/mamba2-2.7b"),
)
BYTE_VOCABULARY = 264
"""Vocabulary of the small models: 256 bytes and the end of a text, padded to a multiple of 8."""

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": BYTE_VOCABULARY}


def mamba2_heads(hidden_size: int, expand: int = 2, head_dim: int = 64) -> int:
    """Number of heads of a Mamba-2 layer, which transformers' configuration wants to be told."""
    return expand * hidden_size // head_dim


def _entries() -> list[LanguageModelEntry]:
    entries = []
    for name, parameters, width, layers, hub_id in _MAMBA:
        sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280}
        summary = f"Mamba, {parameters} parameters, {layers} layers of width {width}; {hub_id}"
        entries.append(LanguageModelEntry(name, summary, "mamba", sizes, hub_id, NEOX_TOKENIZER))
    for name, parameters, width, layers, hub_id in _MAMBA2:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50288}
        sizes |= {"num_heads": mamba2_heads(width), "n_groups": 1, "tie_word_embeddings": True}
        summary = f"Mamba-2, {parameters} parameters, {layers} layers of width {width}; {hub_id}"
        entries.append(LanguageModelEntry(name, summary, "mamba2", sizes, hub_id, NEOX_TOKENIZER))
    entries.append(
        LanguageModelEntry(
            "mamba_tiny", "Mamba of 2 layers, random weights, reads bytes: for trials offline", "mamba", _TINY
        )
    )
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 32}
    entries.append(
        LanguageModelEntry(
            "mamba2_tiny",
            "Mamba-2 of 2 layers, random weights, reads bytes: for trials offline",
            "mamba2",
            {**_TINY, **heads, "tie_word_embeddings": True},
        )
    )
    return entries


for _entry in _entries():
    LANGUAGE_MODELS.add(_entry.name, _entry)


def language_models() -> dict[str, str]:
    """Names of all language models with a line each."""
    return {name: entry.summary for name, entry in LANGUAGE_MODELS.items()}
