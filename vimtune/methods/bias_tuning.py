"""Bias-tuning of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): b' = b + delta.

b (E,) is the bias of the time steps, that of dt_proj; in Mamba-2 it is dt_bias (H,). No other bias is
trained. delta starts at 0, so that weight decay, a hundred times the run's as published, pulls towards the
pretrained value. On Vim both directions are trained, 18,432 numbers of Vim-tiny.

Use it beside LoRA, or in a search over parts: it changes how long steps are, with very few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("bias_tuning")
@dataclass(frozen=True, kw_only=True)
class BiasTuning(FineTuning):
    """Options of bias-tuning; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "the bias of the time steps, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = ("dt_proj.bias", "dt_bias")
    skips_absent_targets = True

    start_decay: Annotated[float, Ge(0)] = option(100.0, START_DECAY)
