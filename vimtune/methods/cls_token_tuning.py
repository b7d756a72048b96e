"""Tuning of the class token, as MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): c' = c + delta.

c (1, 1, D) is the class token; delta starts at 0, so that weight decay, ten times the run's as published,
pulls towards the pretrained value. These are 192 numbers of Vim-tiny.

Use it beside other methods, as searches do: alone it trains too little to adapt much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("cls_token_tuning")
@dataclass(frozen=True, kw_only=True)
class ClsTokenTuning(FineTuning):
    """Options of tuning of the class token; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "the class token, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = "cls_token"

    start_decay: Annotated[float, Ge(0)] = option(10.0, START_DECAY)
