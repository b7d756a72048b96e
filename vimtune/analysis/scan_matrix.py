"""What each token reads from where: the selective scan as a matrix over the tokens.

Unrolled, the scan of a channel (`vimtune.ops.reference.selective_scan`) is a product with a lower triangular
matrix that depends on the input (Ali et al. 2024, arXiv 2403.01590):

    y_t = sum_{s <= t} M_ts u_s + D u_t,      M_ts = C_t^T exp(A (dt_{s+1} + ... + dt_t)) dt_s B_s

M_ts says how much of the input of token s the output of token t reads. The reverse direction has the upper
triangle. What a token reads is shown as the mean of |M_ts| over the channels, divided by its sum over s. D
u_t, which moves nothing between tokens, is no part of it.

Shape letters: B batch, L tokens, E channels, N states, M patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.models import BiMambaMixer, VisionMamba
from vimtune.models.layers import Block
from vimtune.ops import DirectionWeights, causal_conv1d
from vimtune.ops.mixer import scan_parameters

LARGEST = 2**24
"""Numbers of a piece of a matrix that are held at a time; more channels are done one after the other."""


def scan_matrix(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor, reverse: bool = False
) -> Tensor:
    """The matrix M of each channel, (B, E, L, L): token t, that reads, by token s, that is read.

    Args:
        delta: time steps before bias and softplus, (B, L, E).
        A: (E, N), negative.
        B: (B, L, N).
        C: (B, L, N).
        delta_bias: (E,).
        reverse: whether the scan goes from the last token to the first.
    """
    if reverse:
        delta, B, C = delta.flip(1), B.flip(1), C.flip(1)
    steps = F.softplus(delta + delta_bias).transpose(1, 2)  # (B, E, L)
    times = steps.cumsum(-1)
    passed = times[..., :, None] - times[..., None, :]  # (B, E, L, L): dt_{s+1} + ... + dt_t
    later = torch.ones(passed.shape[-2:], dtype=torch.bool, device=passed.device).triu(1)
    # A token that comes later is infinitely far: the exponential of what is not below 0 would overflow.
    passed = passed.masked_fill(later, float("inf"))
    matrix = torch.zeros_like(passed)
    for state in range(A.shape[1]):
        products = C[:, None, :, None, state] * B[:, None, None, :, state]
        matrix += products * torch.exp(A[None, :, None, None, state] * passed)
    matrix *= steps[..., None, :]
    return matrix.flip(-2, -1) if reverse else matrix


def readings(xz: Tensor, weights: DirectionWeights, reverse: bool) -> Tensor:
    """What each token reads, (B, L, L): the mean of |M| over the channels; each row has the sum 1.

    Args:
        xz: the output of in_proj, (B, L, 2 E).
        weights: those of the direction.
        reverse: whether it goes from the last token to the first.
    """
    x = xz.chunk(2, dim=-1)[0]
    u = causal_conv1d(x, weights.conv_weight, weights.conv_bias, True, reverse)
    delta, A, B, C = scan_parameters(u, weights)
    batch, tokens, channels = u.shape
    piece = max(1, LARGEST // (batch * tokens * tokens))
    total = torch.zeros(batch, tokens, tokens, device=u.device)
    for start in range(0, channels, piece):
        own = slice(start, start + piece)
        matrix = scan_matrix(delta[..., own], A[own], B, C, weights.dt_bias[own], reverse)
        total += matrix.abs().sum(1)
    return total / total.sum(-1, keepdim=True)


@torch.no_grad()
def read_maps(model: VisionMamba, images: Tensor) -> Tensor:
    """`readings` of all layers and directions for images (B, C, H, W): (layers, 2, B, L, L) on the CPU.

    They are those of the model in evaluation, with the rules of its adapter for weights. What rules for calls
    do inside the scan, such as tokens that are put before the others, is not seen.
    """
    found: list[Tensor] = []

    def note(mixer: BiMambaMixer, xz: Tensor) -> None:
        pairs = zip(mixer.direction_weights(), (False, True), strict=True)
        found.append(torch.stack([readings(xz, weights, reverse).cpu() for weights, reverse in pairs]))

    mixers = [block.mixer for block in cast(Iterable[Block], model.layers)]
    hooks = [
        mixer.in_proj.register_forward_hook(lambda _, __, xz, mixer=mixer: note(mixer, xz))
        for mixer in mixers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@dataclass(frozen=True)
class Reach:
    """How far the tokens of a layer read in one direction, means over tokens and images."""

    distance: float
    """Mean distance |t - s| in tokens."""
    tokens: float
    """Effective number of tokens that are read, exp of the entropy."""
    itself: float
    """Share that a token reads from itself."""

    @classmethod
    def of(cls, maps: Tensor) -> Reach:
        """Of `readings` (B, L, L)."""
        places = torch.arange(maps.shape[-1])
        apart = (places[:, None] - places).abs()
        entropy = -(maps * maps.clamp(min=1e-30).log()).sum(-1)
        return cls(
            float((maps * apart).sum(-1).mean()),
            float(entropy.exp().mean()),
            float(maps.diagonal(dim1=-2, dim2=-1).mean()),
        )


def as_patch_map(model: VisionMamba, row: Tensor) -> Tensor:
    """What one token reads (L,) over the patches (H', W'), without the class token."""
    place = model.cls_position
    patches = torch.cat([row[:place], row[place + 1 :]])
    return patches.view(model.patch_embed.grid_size)
