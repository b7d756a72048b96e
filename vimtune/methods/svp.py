"""Selective visual prompting (Yao et al. 2025, arXiv 2412.08947): prompts made from the tokens of a Vim.

Use it for prompts that depend on the image, on a Vim. It takes longer than LoRA and does not merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vimtune.fields import Count
from vimtune.methods.base import Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.points import Points
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("svp")
@dataclass(frozen=True, kw_only=True)
class SVP(Method):
    """Options of selective visual prompting; `vimtune.adapters.rules.svp` has the formula."""

    summary = "prompts made from the tokens before every block of a Vim (Yao et al. 2025)"
    default_targets = "update()"
    sized_by = ("width", "group_size")

    width: Count = option(64, "inner width of the generator of a layer")
    group_size: Count = option(8, "neighbouring layers that have one generator in common")

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        # There is nothing between the two layers of a generator, so that a wider one can do no more.
        widths = [getattr(site.model, "embed_dim", None) for site in sites]
        return min((width for width in widths if width), default=None) if option == "width" else None

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        if targets is None and not any(path.endswith(".update()") for path in points.calls):
            raise ValueError(
                f"{self.name} is made for Vim: it acts before blocks, at all tokens but the class token, and "
                "this model has no such blocks"
            )
        return super().select(points, targets, layers)

    def build(self, sites: Sequence[Site]) -> Mapping[str, CallRule]:
        from vimtune.adapters.rules.svp import Generator, Prompter, SVPRule

        rules: dict[str, CallRule] = {}
        for number, site in enumerate(sites):
            model = cast(Any, site.model)
            if not site.path.endswith("update()") or not hasattr(model, "cls_position"):
                raise ValueError(f"{self.name} acts at update() of the blocks of a Vim, not at {site.path}")
            if number % self.group_size == 0:
                shared = Generator(site, model.embed_dim, model.embed_dim)
            own = Generator(site, model.embed_dim, self.at(site).width, model.embed_dim)
            num_tokens = model.patch_embed.num_patches + 1
            rules[site.path] = SVPRule(Prompter(own, shared), num_tokens, model.cls_position)
        return rules
