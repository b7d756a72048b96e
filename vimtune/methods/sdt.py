"""SDT, sparse dimension tuning (Galim et al. 2025, arXiv 2410.09016): a few channels and states of the SSM.

With LoRA on out_proj, "lora+sdt", it is SDLoRA.

Use it beside LoRA, `lora+sdt`, where a few numbers are to change the scan; a short training before the run
chooses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vimtune.fields import Positive, PositiveAmount, Share, option
from vimtune.methods.base import Method, register_method

if TYPE_CHECKING:
    from torch import Tensor

    from vimtune.adapters.points import Points
    from vimtune.adapters.rule import Rule
    from vimtune.adapters.settling import TrainingBatches
    from vimtune.adapters.sites import Site

_PLACE = re.compile(r"(?P<mixer>(?:.*\.)?)(?:A(?P<of_A>_b)?_log|x_proj(?P<of_x>_b)?\.weight\[[BC]\])")
"""The path of a point where the method acts: A_log, or rows B or C of x_proj, of either direction."""
_FOR_ALL = {"criterion", "selection_steps", "selection_lr"}
"""Options that cannot differ from target to target, because there is one selection."""


@register_method("sdt")
@dataclass(frozen=True, kw_only=True)
class SDT(Method):
    """Options of SDT; `vimtune.adapters.rules.sdt` has the formula and what is counted.

    A run chooses before its first step, from training batches. What has been trained for that is dropped, so
    that the run itself starts from the pretrained weights and with fresh tensors of all methods. Until then,
    and for ever where nobody calls `vimtune.adapters.settle`, the adapter keeps what `criterion="magnitude"`
    would choose. The published criterion is "delta"; the others are controls.
    """

    summary = "a few chosen channels and states of the SSM (Galim et al. 2025)"
    default_targets = (r"re:(^|\.)A(_b)?_log$", r"re:(^|\.)x_proj(_b)?\.weight\[[BC]\]$")
    sized_by = ("frozen_channels",)

    frozen_channels: Share = option(0.99, "share of the channels that stay frozen")
    frozen_states: Share = option(0.75, "share of the states of a trained channel that stay frozen in A_log")
    criterion: Literal["delta", "gradient", "magnitude", "random"] = option(
        "delta",
        'what is kept: the largest change of A_log in a short training ("delta"), the largest gradient or '
        "magnitude of it, or anything",
    )
    selection_steps: Positive = option(
        500, "updates, or batches of the gradient, by which entries are chosen"
    )
    selection_lr: PositiveAmount = option(1e-3, "learning rate of these updates")

    @property
    def settles(self) -> bool:
        return self.criterion in ("delta", "gradient")

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        named = (f"{path}[{row}]" for path, rows in points.rows.items() for row in rows)
        if targets is None and not any(map(_mixer, named)):
            raise ValueError(
                "sdt acts on A_log and on the rows B and C of x_proj, which this model does not have: "
                "expected a Vim or Mamba"
            )
        return super().select(points, targets, layers)

    def build(self, sites: Sequence[Site]) -> Mapping[str, Rule]:
        from vimtune.adapters.rules.sdt import ColumnsRule, SparseRule, StatesRule

        rules: dict[str, SparseRule] = {}
        channels: dict[tuple[str, str], Tensor] = {}
        for site in sites:
            mixer = _mixer(site.path)
            if mixer is not None and _is_states(site.path):
                rules[site.path] = rule = StatesRule(site.weight, *self.at(site).sizes(site))
                channels[mixer] = rule.select(self.first_scores(site))
        for site in sites:
            if site.path in rules:
                continue
            mixer = _mixer(site.path)
            if mixer is None:
                raise ValueError(f"sdt acts on A_log and on rows B and C of x_proj, and not on {site.path}")
            if mixer not in channels:
                raise ValueError(
                    f"sdt chooses the columns of {site.path} by A_log of the same direction, which is not "
                    "among its targets: name it as well"
                )
            rules[site.path] = ColumnsRule(site.weight, channels[mixer])
        return {site.path: rules[site.path] for site in sites}

    def sizes(self, site: Site) -> tuple[int, int]:
        """How many channels of A_log train, and how many states of each; at least one of both.

        As in the authors' code the number of the frozen ones is rounded as Python rounds.

        Raises:
            ValueError: A_log is not (channels, states), or an option differs between targets that cannot.
        """
        if site.weight.dim() != 2:
            raise ValueError(
                f"sdt chooses channels and states, and {site.path} has shape {tuple(site.weight.shape)}: "
                "expected (channels, states), as in Vim and Mamba"
            )
        if differing := _FOR_ALL & site.options.keys():
            raise ValueError(
                f"option {min(differing)} of sdt cannot differ from target to target: give one value"
            )
        channels, states = site.weight.shape
        return (
            max(1, channels - round(self.frozen_channels * channels)),
            max(1, states - round(self.frozen_states * states)),
        )

    def first_scores(self, site: Site) -> Tensor:
        """Scores of the entries of A_log that need no data."""
        import torch

        weight = site.weight
        return torch.rand_like(weight) if self.criterion == "random" else weight.square()

    def settle(self, rules: Mapping[str, Rule], batches: TrainingBatches) -> None:
        from vimtune.adapters.rules.sdt import ColumnsRule, StatesRule, find_scores

        states = {path: rule for path, rule in rules.items() if isinstance(rule, StatesRule)}
        columns = {path: rule for path, rule in rules.items() if isinstance(rule, ColumnsRule)}
        gradient = self.criterion == "gradient"
        scores = find_scores(
            states, [*columns.values()], batches, gradient, self.selection_steps, self.selection_lr
        )
        channels = {_mixer(path): rule.select(scores[path]) for path, rule in states.items()}
        for path, rule in columns.items():
            rule.select(channels[_mixer(path)])


def _mixer(path: str) -> tuple[str, str] | None:
    """The mixer that a point belongs to, and the direction; None for points of other kinds."""
    match = _PLACE.fullmatch(path)
    return None if match is None else (match["mixer"], match["of_A"] or match["of_x"] or "")


def _is_states(path: str) -> bool:
    """Whether a point of this method is A_log."""
    return path.endswith("_log")
