"""D-tuning of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): D' = D + delta.

D (E,) is the weight of a scan's input in its output; delta starts at 0, so that weight decay, ten times the
run's as published, pulls towards the pretrained value. On Vim both directions are trained, 18,432 numbers
of Vim-tiny; in Mamba-2 D (H,) has one number for each head.

Use it beside LoRA, or in a search over parts: it changes how much of a token passes a scan by, with very
few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("d_tuning")
@dataclass(frozen=True, kw_only=True)
class DTuning(FineTuning):
    """Options of D-tuning; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "D of the scans, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = "D"

    start_decay: Annotated[float, Ge(0)] = option(10.0, START_DECAY)
