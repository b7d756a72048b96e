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

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from vimtune.analysis.drawing import plain_numbers
from vimtune.analysis.subject import Subject
from vimtune.models import BiMambaMixer, VisionMamba
from vimtune.models.layers import Block
from vimtune.ops import DirectionWeights, causal_conv1d
from vimtune.ops.mixer import scan_parameters
from vimtune.pages.section import Picture, Section, Table
from vimtune.pages.style import picture_style, whole_numbers
from vimtune.text import counted

DIRECTIONS = ("forward", "reverse")
"""The directions of a mixer, in the order of its weights."""
LAYERS_SHOWN = 4
"""Layers whose maps the pictures show."""
LARGEST = 2**24
"""Numbers of a piece of a matrix that are held at a time; more channels are done one after the other."""
IMAGES, PAIRS = 4, 2**17
"""At most so many images, and so many pairs of tokens of all images together, but for one image: the matrices
of an image of 224 pixels take a CPU half a minute."""


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


def analyze(subject: Subject) -> Section:
    """Maps of the trained model for one image, and how they differ from those before training."""
    before, after = subject.vims()
    tokens = before.patch_embed.num_patches + 1
    images = torch.cat(subject.images())[: max(1, min(IMAGES, PAIRS // tokens**2))]
    old, new = read_maps(before, images), read_maps(after, images)
    # Half the sum of absolute differences: the share of what is read that is now read elsewhere.
    shifts = (new - old).abs().sum(-1).div(2).mean((-2, -1))
    rows = [
        (layer, direction, Reach.of(new[layer, number]), float(shifts[layer, number]))
        for layer in range(len(new))
        for number, direction in enumerate(DIRECTIONS)
    ]
    chosen = _spread_out(len(new), LAYERS_SHOWN)
    farthest = max(rows, key=lambda row: row[2].distance)
    moved = shifts.mean(1)
    return Section(
        title="What each token reads from where (scan maps)",
        explanation="The selective scan of a channel is a product with a triangular matrix M over the "
        "tokens; M_ts = C_t exp(A (dt_(s+1) + ... + dt_t)) dt_s B_s is what the output of token t reads of "
        "the input of token s. Shown is the mean of |M| over the channels, as shares that add up to 1 for "
        "each token. The forward direction reads what comes before in the order of rows, the reverse one "
        "what comes after. Inputs of the scan are mixtures of neighbouring tokens already (the "
        "convolution).",
        findings=[
            f"Tokens read at a mean distance of {_mean(rows, 'distance'):.1f} tokens, effectively "
            f"{_mean(rows, 'tokens'):.1f} of them, {100 * _mean(rows, 'itself'):.0f} % from themselves; "
            f"farthest in layer {farthest[0]}, {farthest[1]} ({farthest[2].distance:.1f}).",
            f"Training has moved {100 * float(moved.mean()):.1f} % of what is read elsewhere, most in layer "
            f"{int(moved.argmax())} ({100 * float(moved.max()):.1f} %); {counted(len(images), 'images')}.",
        ],
        numbers={
            "images": len(images),
            "layers": [
                {"layer": layer, "direction": direction, **asdict(reach), "shift": shift}
                for layer, direction, reach, shift in rows
            ],
        },
        tables=[
            Table(
                "Means over tokens and images",
                ["layer", "distance", "effective tokens", "from itself", "moved by training"],
                [
                    [
                        f"{layer} {direction}",
                        f"{reach.distance:.1f}",
                        f"{reach.tokens:.1f}",
                        f"{100 * reach.itself:.0f} %",
                        f"{100 * shift:.1f} %",
                    ]
                    for layer, direction, reach, shift in rows
                ],
            )
        ],
        pictures=[
            Picture(
                "What chosen tokens of one image read after training, over its patches: the class token, "
                "whose place in the sequence is between the two middle patches, and two patches "
                "(outlined). Brighter is more, the scale is that of each map; what a direction cannot read "
                "is grey.",
                _draw_tokens(after, images[0], new[:, :, 0], chosen),
            ),
            Picture(
                "All tokens of the same image: the row reads, the column is read; mean of both directions, "
                "logarithmic colours.",
                _draw_matrices(new[:, :, 0], chosen),
            ),
            Picture("Mean distance at which tokens read, before and after training.", _draw_reach(old, new)),
        ],
    )


def _mean(rows: Sequence[tuple[int, str, Reach, float]], name: str) -> float:
    return float(statistics.mean(getattr(reach, name) for _, _, reach, _ in rows))


def _spread_out(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly, the first and the last among them."""
    count = min(count, total)
    return sorted({round(part * (total - 1) / max(count - 1, 1)) for part in range(count)})


def as_patch_map(model: VisionMamba, row: Tensor) -> Tensor:
    """What one token reads (L,) over the patches (H', W'), without the class token."""
    place = model.cls_position
    patches = torch.cat([row[:place], row[place + 1 :]])
    return patches.view(model.patch_embed.grid_size)


def _draw_tokens(model: VisionMamba, image: Tensor, maps: Tensor, layers: Sequence[int]) -> Figure:
    height, width = model.patch_embed.grid_size
    place = model.cls_position
    patches = [(height // 4) * width + width // 4, (3 * height // 4) * width + 3 * width // 4]
    tokens = [("class token", place, None)] + [
        (f"patch {patch // width}, {patch % width}", patch + (patch >= place), patch) for patch in patches
    ]
    with picture_style():
        figure = Figure(figsize=(1.7 * (len(layers) + 1), 1.75 * 2 * len(tokens)), layout="constrained")
        grid = figure.subplots(2 * len(tokens), len(layers) + 1, squeeze=False)
        for number, line in enumerate(grid):
            (name, token, patch), direction = tokens[number // 2], number % 2
            _show_image(line[0], image)
            line[0].set_title(f"{name}, {DIRECTIONS[direction]}", fontsize=8)
            _outline(line[0], patch, width, image.shape[-1] / width, image.shape[-2] / height)
            order = torch.arange(maps.shape[-1])
            unread = order > token if direction == 0 else order < token
            for axes, layer in zip(line[1:], layers, strict=True):
                row = maps[layer, direction, token].masked_fill(unread, float("nan"))
                axes.set_facecolor("0.75")
                axes.imshow(as_patch_map(model, row).numpy(), cmap="inferno", vmin=0)
                _outline(axes, patch, width, 1, 1)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.set_title(f"layer {layer}", fontsize=8)
        return figure


def _show_image(axes: Axes, image: Tensor) -> None:
    """An image as the model gets it, its colours brought back into their range."""
    low, high = image.amin(), image.amax()
    shown = ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).cpu()
    axes.imshow(shown[..., :3].numpy() if shown.shape[-1] >= 3 else shown[..., 0].numpy())
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: Axes, patch: int | None, columns: int, width: float, height: float) -> None:
    """Draw a frame around a patch of a grid with so many columns, if it is one."""
    if patch is None:
        return
    left, top = (patch % columns) * width - 0.5, (patch // columns) * height - 0.5
    right, bottom = left + width, top + height
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="cyan", linewidth=1.2)


def _draw_matrices(maps: Tensor, layers: Sequence[int]) -> Figure:
    with picture_style():
        figure = Figure(figsize=(2.6 * len(layers) + 0.6, 2.8), layout="constrained")
        grid = figure.subplots(1, len(layers), squeeze=False)[0]
        norm = LogNorm(vmin=1e-4, vmax=1)
        for axes, layer in zip(grid, layers, strict=True):
            picture = axes.imshow(maps[layer].mean(0).clamp(min=1e-4).numpy(), cmap="magma", norm=norm)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("token that is read", fontsize=8)
        grid[0].set_ylabel("token that reads", fontsize=8)
        plain_numbers(figure.colorbar(picture, ax=list(grid), shrink=0.9).ax.yaxis)
        return figure


def _draw_reach(old: Tensor, new: Tensor) -> Figure:
    with picture_style():
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for direction, name in enumerate(DIRECTIONS):
            values = [Reach.of(maps[direction]).distance for maps in new]
            (line,) = axes.plot(values, marker="o", markersize=3, label=f"{name}, after")
            earlier = [Reach.of(maps[direction]).distance for maps in old]
            axes.plot(earlier, color=line.get_color(), linestyle="--", label=f"{name}, before")
        axes.set(xlabel="layer", ylabel="mean distance, tokens")
        axes.xaxis.set_major_locator(whole_numbers())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure
