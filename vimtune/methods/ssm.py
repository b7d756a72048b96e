"""The parameters of the scan itself, as they are trained beside LoRA on the projectors (`lora+ssm`).

    A_log' = A_log + delta_A,    D' = D + delta_D,    b' = b + delta_b

A_log (E, N), D (E,) and the bias b (E,) of the time steps; in Mamba-2 all three have one number for each of
its H heads. These are A-, D- and bias-tuning of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855) in one,
with decay towards the pretrained values as strong as there. On Vim both directions are trained, 331,776
numbers of Vim-tiny.

Use it to train the scan itself, mostly beside LoRA: `lora+ssm`. It merges into a plain model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from vimtune.methods.base import option, register_method
from vimtune.methods.ft import START_DECAY, FineTuning

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("ssm")
@dataclass(frozen=True, kw_only=True)
class SSM(FineTuning):
    """Options of training a scan's parameters; `vimtune.adapters.rule.Shifted` has the formula."""

    summary = "A, D and the bias of the time steps, with decay towards the start"
    default_targets = ("A_log", "D", "dt_proj.bias", "dt_bias")
    skips_absent_targets = True

    start_decay: Annotated[float, Ge(0)] = option(10.0, START_DECAY)
    bias_decay: Annotated[float, Ge(0)] = option(100.0, "start_decay of the bias of the time steps")

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.targets import is_bias

        decay = self.bias_decay if is_bias(site.path) else self.start_decay
        return FineTuning(start_decay=decay).build_rule(site)
