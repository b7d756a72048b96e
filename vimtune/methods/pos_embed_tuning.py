"""Tuning of the position embedding, as MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): P' = P + delta.

P (1, L, D) has a vector for each of the L tokens; delta starts at 0, so that weight decay pulls towards the
pretrained value. These are 37,824 numbers of Vim-tiny.

Use it beside other methods where objects stand elsewhere than in the images of the pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("pos_embed_tuning")
@dataclass(frozen=True, kw_only=True)
class PosEmbedTuning(FineTuning):
    """Options of tuning of the position embedding; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "the position embedding, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = "pos_embed"

    start_decay: Annotated[float, Ge(0)] = option(1.0, START_DECAY)
