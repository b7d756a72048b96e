"""The parameters of a model before and after training, by group and by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vimtune.adapters import base_parameters
from vimtune.adapters.slots import in_evaluation

GROUPS: Mapping[str, frozenset[str]] = {
    "projectors": frozenset({"in_proj", "out_proj"}),
    "SSM": frozenset(
        {"x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "dt_bias", "A_log", "A_b_log", "D", "D_b"}
    ),
    "convolution": frozenset({"conv1d", "conv1d_b"}),
    "norms": frozenset({"norm", "norm_f"}),
    "embedding": frozenset({"patch_embed", "cls_token", "pos_embed", "embeddings"}),
    "head": frozenset({"head", "lm_head"}),
}
"""The groups of parameters of the component study (Ham et al. 2025, arXiv 2411.15224), by the names of
modules and parameters that belong to them. What has none of these names is in the group "others"."""

OTHERS = "others"
"""The group of parameters that no other group has."""

PROJECTORS = ("in_proj", "out_proj")
"""The two projectors of a mixer."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")


def group_of(path: str) -> str:
    """The group of the parameter `path`."""
    names = set(path.split("."))
    return next((group for group, own in GROUPS.items() if names & own), OTHERS)


def layer_of(path: str) -> int | None:
    """Index of the block that a parameter belongs to; None outside the blocks."""
    found = _LAYER.search(path)
    return None if found is None else int(found.group(1))


def projector_of(path: str) -> tuple[int, str] | None:
    """Layer and name of the projector whose weight the parameter `path` is; None for any other one."""
    layer, (*_, name, leaf) = layer_of(path), ("", *path.split("."))
    return None if layer is None or name not in PROJECTORS or leaf != "weight" else (layer, name)


@torch.no_grad()
def effective_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The value of every parameter as the model computes with it in evaluation, rules of the active adapter
    included, by the path of the base parameter; detached."""
    values = {}
    with in_evaluation(model):
        for path, _ in base_parameters(model):
            owner, _, name = path.rpartition(".")
            values[path] = getattr(model.get_submodule(owner), name).detach()
    return values


def changed_projectors(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Projectors whose weight training has changed.

    Args:
        before: `effective_parameters` of the model before training.
        after: those afterwards.

    Yields:
        Layer, name ("in_proj" or "out_proj"), weight before and weight after, both (out, in).
    """
    for path, weight in before.items():
        place = projector_of(path)
        if place is not None and after[path].shape == weight.shape and not torch.equal(after[path], weight):
            yield *place, weight, after[path]
