"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias."""

from __future__ import annotations

from dataclasses import dataclass

from vimtune.adapters.base import register_method
from vimtune.adapters.ft import FineTuning
from vimtune.adapters.rule import base_parameters
from vimtune.adapters.targets import matches, resolve_targets


@register_method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(FineTuning):
    summary = "every bias: convolutions, time steps, patch embedding (Ben Zaken et al. 2021)"

    def select(self, model, targets, layers):
        biases = [path for path, _ in base_parameters(model) if _is_bias(path)]
        if targets is None:
            return biases if layers is None else resolve_targets(model, biases, layers)
        targets = targets.split(",") if isinstance(targets, str) else targets
        return resolve_targets(model, [_bias_of(target.strip(), biases) for target in targets], layers)


def _is_bias(path: str) -> bool:
    """Whether a parameter is a bias by its name, as are `dt_bias` and `bias_ih_l0` beside their weights."""
    name = path.rpartition(".")[2]
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def _bias_of(target: str, biases: list[str]) -> str:
    """The target itself if it names a bias, else the bias of the module that it names."""
    return target if any(matches(path, target) for path in biases) else f"{target}.bias"
