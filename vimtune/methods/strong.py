"""The "Strong" baseline (Halloran et al. 2024, arXiv 2406.00209): LoRA on in_proj, out_proj and x_proj, and
on the embedding of a language model.

Use it where the projections to the parameters of the scan are to change, too, and as the baseline of the
ProDiaL paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from vimtune.methods.base import register_method
from vimtune.methods.lora import LoRA


@register_method("strong")
@dataclass(frozen=True, kw_only=True)
class Strong(LoRA):
    """Options of the Strong baseline, which are those of LoRA."""

    summary = "LoRA on in_proj, out_proj and all x_proj, on embeddings of tokens (Halloran et al. 2024)"
    peft_type = "LORA"
    default_targets = ("in_proj", "out_proj", "x_proj", "embeddings")
    skips_absent_targets = True  # a Vim has no embeddings of tokens, Mamba-2 no x_proj
