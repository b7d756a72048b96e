"""Conv1d-tuning of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): W' = W + delta.

W (E, 1, K) holds the filters of the causal convolution before a scan; their bias is not trained. delta
starts at 0, so that weight decay, ten times the run's as published, pulls towards the pretrained value. On
Vim both directions are trained, 73,728 numbers of Vim-tiny.

Use it beside LoRA, or in a search over parts, where local patterns of the new images differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning


@register_method("conv1d_tuning")
@dataclass(frozen=True, kw_only=True)
class Conv1dTuning(FineTuning):
    """Options of conv1d-tuning; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "the filters before the scans, with decay towards the start (Yoshimura et al. 2025)"
    default_targets = "conv1d"

    start_decay: Annotated[float, Ge(0)] = option(10.0, START_DECAY)
