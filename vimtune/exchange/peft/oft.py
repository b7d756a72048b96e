"""HF peft's OFT, exact or by its truncated series (our option `series`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from torch import Tensor, nn

from vimtune.adapters.rules.oft import OFTRule
from vimtune.exchange.peft.form import (
    AdaptedModule,
    GivenModule,
    PeftConfig,
    PeftForm,
    Translated,
    Written,
    demand_names,
    refuse_kind,
    refuse_single,
)

SERIES_SINCE = "0.18.0"
"""Version of HF peft since which the series is the present one. Files name their version since then, too."""
LEAST_TERMS = 4
"""HF peft computes three terms as it does four, I + 2 Q + 2 Q^2 + Q^3."""


@dataclass(frozen=True, kw_only=True)
class OFTConfig(PeftConfig):
    """`peft.OFTConfig` as far as it means something here; other settings have to be off."""

    r: Annotated[int, Ge(0), Le(2**20)] = 0
    """Number of blocks; the tensors have it, too."""
    oft_block_size: Annotated[int, Ge(0), Le(2**20)] = 32
    """Side of the blocks; the tensors have it, too."""
    module_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Dropout of whole rotations in training, which is not here: training goes on without."""
    coft: Literal[False] = False
    """Whether rotations stay near none."""
    eps: float = 6e-5
    """How near; a setting of `coft`."""
    block_share: Literal[False] = False
    """Whether all blocks are one."""
    use_cayley_neumann: bool = True
    """Whether rotations are computed by a series."""
    num_cayley_neumann_terms: Annotated[int, Ge(3), Le(64)] = 5
    """Of how many terms."""
    init_weights: bool = True
    """Whether training started without a rotation."""


class OFTForm(PeftForm):
    """See the text of this module."""

    config = OFTConfig
    names = ("oft_R.weight", "oft_R")

    def write(self, modules: Sequence[AdaptedModule]) -> Written:
        tensors: dict[str, Tensor] = {}
        sizes, series = {}, set()
        for adapted in modules:
            refuse_kind(adapted.path, adapted.module, (nn.Linear,))
            rule = refuse_single(adapted, OFTRule)
            tensors[f"{adapted.path}.oft_R.weight"] = rule.angles
            sizes[adapted.path] = rule.block_size
            series.add(rule.series)
        if len(set(sizes.values())) > 1 or len(series) > 1:
            raise ValueError(
                f"HF peft has one block size and one series for all modules, and here are blocks of "
                f"{', '.join(map(str, sorted(set(sizes.values()))))}: give the option block_size"
            )
        (terms,) = series
        (size,) = set(sizes.values())
        settings: dict[str, Any] = {"r": 0, "oft_block_size": size, "use_cayley_neumann": terms is not None}
        if terms is not None:
            settings |= {"num_cayley_neumann_terms": terms, "peft_version": SERIES_SINCE}
        return Written(settings, tensors)

    def read(self, config: OFTConfig, modules: Sequence[GivenModule]) -> Translated:
        if config.use_cayley_neumann and config.peft_version is None:
            raise ValueError(
                f"its rotations are a series, and it names no peft_version: before {SERIES_SINCE} the series "
                "was another one. Expected a file of a later version: train again, or with "
                "use_cayley_neumann=False"
            )
        series = max(LEAST_TERMS, config.num_cayley_neumann_terms) if config.use_cayley_neumann else None
        options, tensors = {}, {}
        for given in modules:
            refuse_kind(given.path, given.module, (nn.Linear,))
            short = {name.removesuffix(".weight"): tensor for name, tensor in given.tensors.items()}
            (angles,) = demand_names(GivenModule(given.path, given.module, short), "oft_R")
            size = (1 + math.isqrt(1 + 8 * angles.shape[-1])) // 2
            if angles.dim() != 2 or size * (size - 1) // 2 != angles.shape[-1]:
                raise ValueError(
                    f"{given.path}.oft_R has shape {tuple(angles.shape)}: expected (blocks, b (b - 1) / 2)"
                )
            options[given.path] = {"block_size": size, "series": series}
            tensors[given.path] = {"angles": angles}
        return Translated("oft", options, tensors)
