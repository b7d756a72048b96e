"""LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + s B A, s = alpha / r.

Use it as the first adapter and as the yardstick of the others: it merges, it is among the fastest to
train, and most papers compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Lt

from vimtune.methods.base import Method, check_matrix, option, register_method
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.adapters.rule import Rule, WeightRule
    from vimtune.adapters.rules.lora import LoRARule, LowRank
    from vimtune.adapters.sites import Site

GRADIENT_BATCHES = 4
"""How many training batches the start from a gradient looks at."""


@register_method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Options of LoRA; `vimtune.adapters.rules.lora` has the formula."""

    summary = "low-rank update of the projectors (Hu et al. 2021)"
    adds_up = True
    peft_type = "LORA"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)

    rank: Annotated[int, Ge(1)] = option(16, "rank r of the update B A; by target: in_proj=8,x_proj[B]=4")
    alpha: Annotated[float, Gt(0)] = option(8.0, "the update is scaled by alpha / rank (see scaling)")
    dropout: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "dropout on the input of A, where the layer is called rather than read"
    )
    scaling: Literal["standard", "rslora", "direct"] = option(
        "standard", '"standard": alpha / rank; "rslora": alpha / sqrt(rank); "direct": alpha itself'
    )
    start: Literal["random", "pissa", "gradient"] = option(
        "random",
        '"random": A random, B zero; "pissa": principal components; "gradient": A from the gradient, B zero',
    )
    lr_ratio: Annotated[float, Gt(0)] = option(1.0, "learning rate of B as a multiple of that of A (LoRA+)")

    @property
    def settles(self) -> bool:
        return self.start == "gradient"

    @property
    def scale(self) -> float:
        """The factor s of the update B A."""
        divisors = {"standard": self.rank, "rslora": math.sqrt(self.rank), "direct": 1}
        return self.alpha / divisors[self.scaling]

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        if option != "rank":
            return None
        return min(
            (min(site.weight.flatten(1).shape) for site in sites if site.weight.dim() > 1), default=None
        )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.lora import LoRARule

        return LoRARule(self.build_branch(site))

    def build_branch(self, site: Site) -> LowRank:
        """The low-rank branch beside a weight.

        Raises:
            ValueError: the site is no matrix, or rank and start do not fit it.
        """
        from vimtune.adapters.rules.lora import LowRank

        rows, columns = check_matrix(self.name, site, self.rank)
        if self.start != "random" and self.rank > min(rows, columns):
            raise ValueError(
                f"rank {quote(self.rank)} with start {self.start!r}: {site.path} of shape {rows} x {columns} "
                f"has {min(rows, columns)} singular vectors; lower the rank, or choose start 'random'"
            )
        return LowRank(site.weight, self.rank, self.scale, self.dropout, self.start, self.lr_ratio)

    def settle(self, rules: Mapping[str, Rule], batches: Iterable[Callable[[], float]]) -> None:
        from vimtune.adapters.rules.lora import start_from_gradients

        branches = [cast("LoRARule", rule).branch for rule in rules.values()]
        starting = [branch for branch in branches if branch.start == "gradient"]
        start_from_gradients(starting, list(islice(batches, GRADIENT_BATCHES)))
