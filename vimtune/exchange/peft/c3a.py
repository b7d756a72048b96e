"""HF peft's C3A, whose kernels are ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vimtune.adapters.rules.circulant import C3ARule
from vimtune.exchange.peft.form import (
    AdaptedModule,
    GivenModule,
    Pattern,
    PeftConfig,
    PeftForm,
    Size,
    Text,
    Translated,
    Written,
    demand_names,
    refuse_kind,
    refuse_single,
)


@dataclass(frozen=True, kw_only=True)
class C3AConfig(PeftConfig):
    """`peft.C3AConfig`."""

    block_size: Size = 256
    """Side of the blocks; the tensors have it, too."""
    block_size_pattern: dict[Pattern, Size] = field(default_factory=dict)
    """That of single modules; the tensors have it, too."""
    init_weights: bool | Text | None = True
    """How training started."""


class C3AForm(PeftForm):
    """See the text of this module."""

    config = C3AConfig
    names = ("c3a_kernel",)

    def write(self, modules: Sequence[AdaptedModule]) -> Written:
        tensors: dict[str, Tensor] = {}
        for adapted in modules:
            refuse_kind(adapted.path, adapted.module, (nn.Linear,))
            tensors[f"{adapted.path}.c3a_kernel"] = refuse_single(adapted, C3ARule).kernels
        sizes = {adapted.path: tensors[f"{adapted.path}.c3a_kernel"].shape[-1] for adapted in modules}
        usual = Counter(sizes.values()).most_common(1)[0][0]
        others = {path: size for path, size in sizes.items() if size != usual}
        return Written({"block_size": usual, "block_size_pattern": others}, tensors)

    def read(self, config: C3AConfig, modules: Sequence[GivenModule]) -> Translated:
        options, tensors = {}, {}
        for given in modules:
            refuse_kind(given.path, given.module, (nn.Linear,))
            (kernels,) = demand_names(given, "c3a_kernel")
            if kernels.dim() != 3:
                raise ValueError(
                    f"{given.path}.c3a_kernel has shape {tuple(kernels.shape)}: expected (out / b, in / b, b)"
                )
            options[given.path], tensors[given.path] = {"block_size": kernels.shape[-1]}, {"kernels": kernels}
        return Translated("c3a", options, tensors)
