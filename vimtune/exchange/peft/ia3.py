"""HF peft's IA3: modules have a factor for each input where they are "feedforward", else for each output.

There the factors of outputs multiply the bias, too, and ours do not: layers with a bias are refused for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vimtune.adapters.rules.ia3 import IA3Rule
from vimtune.exchange.peft.form import (
    AdaptedModule,
    GivenModule,
    ModulePath,
    PeftConfig,
    PeftForm,
    Translated,
    Written,
    demand_names,
    refuse_kind,
    refuse_single,
)


@dataclass(frozen=True, kw_only=True)
class IA3Config(PeftConfig):
    """`peft.IA3Config`."""

    feedforward_modules: list[ModulePath] | ModulePath | None = field(default_factory=list)
    """Modules with factors for their inputs; the shapes of the tensors say it, too."""
    init_ia3_weights: bool = True
    """Whether training started at ones."""


class IA3Form(PeftForm):
    """See the text of this module."""

    config = IA3Config
    names = ("ia3_l",)

    def write(self, modules: Sequence[AdaptedModule]) -> Written:
        tensors: dict[str, Tensor] = {}
        feedforward = []
        for adapted in modules:
            refuse_kind(adapted.path, adapted.module, (nn.Linear,))
            rule = refuse_single(adapted, IA3Rule)
            if rule.side == "input":
                feedforward.append(adapted.path)
            else:
                _refuse_bias(adapted.path, adapted.module)
            shape = (1, -1) if rule.side == "input" else (-1, 1)
            tensors[f"{adapted.path}.ia3_l"] = rule.scale.reshape(shape)
        return Written({"feedforward_modules": feedforward}, tensors)

    def read(self, config: IA3Config, modules: Sequence[GivenModule]) -> Translated:
        options, tensors = {}, {}
        for given in modules:
            refuse_kind(given.path, given.module, (nn.Linear,))
            (scale,) = demand_names(given, "ia3_l")
            if scale.dim() != 2 or 1 not in scale.shape:
                raise ValueError(
                    f"{given.path}.ia3_l has shape {tuple(scale.shape)}: expected (out, 1) or (1, in)"
                )
            side = "output" if scale.shape[1] == 1 else "input"
            if side == "output":
                _refuse_bias(given.path, given.module)
            options[given.path], tensors[given.path] = {"side": side}, {"scale": scale.flatten()}
        return Translated("ia3", options, tensors)


def _refuse_bias(path: str, module: nn.Module) -> None:
    if getattr(module, "bias", None) is not None:
        raise ValueError(
            f"{path} has a bias, which HF peft multiplies by the factors of the outputs and vimtune does "
            "not: use factors of the inputs (side 'input', feedforward_modules)"
        )
