"""A-tuning of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): A_log' = A_log + delta.

A_log (E, N) is the logarithm of -A; delta starts at 0, so that weight decay, ten times the run's as
published, pulls towards the pretrained value. On Vim both directions are trained, 294,912 numbers of Vim-
tiny; in Mamba-2 A_log (H,) has one number for each head.

Use it beside LoRA, or in a search over parts, to let each channel forget at another pace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("a_tuning")
@dataclass(frozen=True, kw_only=True)
class ATuning(FineTuning):
    """Options of A-tuning; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "A of the scans, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = "A_log"

    start_decay: Annotated[float, Ge(0)] = option(10.0, START_DECAY)
