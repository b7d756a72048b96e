"""Additional-scan (MambaPEFT, arXiv 2411.03855): more states for every channel of a scan.

Use it where more memory in the scans is worth a slower model: the states stay after merging.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vimtune.fields import Count
from vimtune.methods.base import Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.points import Points
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site

_DECAYS = {"x_proj.weight": "A_log", "x_proj_b.weight": "A_b_log"}
"""The parameter whose columns are the states that a projection serves, in the same mixer."""
_SIZES = (("d_state", "depth", 2), ("state_size", "num_hidden_layers", 1))
"""How a Vim and a language model call their numbers of states and of layers, and the directions of a scan."""


@register_method("additional_scan")
@dataclass(frozen=True, kw_only=True)
class AdditionalScan(Method):
    """Options of additional-scan; `vimtune.adapters.rules.additional_scan` has the formula."""

    summary = "more states for every channel of a scan (Yoshimura et al. 2025)"
    sized_by = ("num_states",)

    num_states: Count = option(6, "states beside those that the model has")

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        # A scan takes longer by as much as it has states, so a budget at most doubles them.
        decays = _directions(site.path for site in sites).values()
        return min((site.weight.shape[1] for site in sites if site.path in decays), default=None)

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        from vimtune.adapters.targets import in_layers

        if targets is not None:
            return super().select(points, targets, layers)
        paired = {path for pair in _directions(points.parameters).items() for path in pair}
        if not paired:
            raise ValueError(
                f"{self.name} gives x_proj more rows and A_log more columns, and this model has no such "
                "pair: it acts on the mixers of Vim and Mamba"
            )
        paths = [path for path in points.parameters if path in paired]
        return paths if layers is None else in_layers(paths, layers)

    def build(self, sites: Sequence[Site]) -> Mapping[str, WeightRule]:
        from vimtune.adapters.rules.additional_scan import MoreDecays, MoreProjections

        by_path = {site.path: site for site in sites}
        pairs = _directions(by_path)
        for path, site in by_path.items():
            if path not in pairs and path not in pairs.values():
                raise ValueError(
                    f"{self.name} needs x_proj and A_log of a direction together, and {path} is alone among "
                    "the targets"
                )
            if "num_states" in site.options:
                raise ValueError(
                    f"num_states of {self.name} is given for {path}, but all layers of a model have equally "
                    "many states: give one number"
                )
        rules: dict[str, WeightRule] = {}
        for projection, decays in pairs.items():
            x_proj, A_log = by_path[projection].weight, by_path[decays].weight
            if getattr(by_path[decays].owner, "initial_state", None) is not None:
                raise ValueError(
                    f"{self.name} adds states, and the scan with {decays} begins with a state for the "
                    f"{A_log.shape[1]} that it has (initial_state=True): train {self.name} on the model "
                    "before affix is merged, or together with affix"
                )
            rules[decays] = MoreDecays(A_log, self.num_states)
            rules[projection] = MoreProjections(x_proj, A_log.shape[1], self.num_states)
        return rules

    def merged_options(self, options: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
        """More states, by the name that they have in a Vim's options or in transformers' configurations.

        Raises:
            ValueError: some layers or directions keep the states that they have, or the model is of another
                kind.
        """
        for states, depth, directions in _SIZES:
            if states in options and depth in options:
                everywhere = 2 * directions * options[depth]
                if len(sites) == everywhere:
                    return {**options, states: options[states] + self.num_states}
                raise ValueError(
                    f"{self.name} acts on {len(sites)} of {everywhere} parameters, and the scans of a plain "
                    "model have equally many states everywhere; nothing was merged. Keep the adapter beside "
                    "the model, or train one without targets and layers"
                )
        raise ValueError(
            f"{self.name} does not know by which of its options this model is created with more states; "
            "nothing was merged. Keep the adapter beside the model"
        )


def _directions(paths: Iterable[str]) -> dict[str, str]:
    """The projection of each scan whose parameters are among `paths`, with the parameter of its decays."""
    known = dict.fromkeys(paths)
    pairs = {
        path: path.removesuffix(projection) + decays
        for path in known
        for projection, decays in _DECAYS.items()
        if f".{path}".endswith(f".{projection}")
    }
    return {projection: decays for projection, decays in pairs.items() if decays in known}
