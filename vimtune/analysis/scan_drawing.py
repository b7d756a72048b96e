"""Pictures of what each token reads from where. L tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from vimtune.analysis.drawing import plain_numbers
from vimtune.analysis.scan_matrix import Reach, as_patch_map
from vimtune.models import VisionMamba
from vimtune.pages.style import picture_style, whole_numbers

DIRECTIONS = ("forward", "reverse")
"""The directions of a mixer, in the order of its weights."""


def draw_tokens(model: VisionMamba, image: Tensor, maps: Tensor, layers: Sequence[int]) -> Figure:
    """What the class token and two patches of one image (C, H, W) read, of its maps (layers, 2, L, L)."""
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


def draw_matrices(maps: Tensor, layers: Sequence[int]) -> Figure:
    """What every token reads, the mean of both directions, of maps (layers, 2, L, L)."""
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


def draw_reach(old: Tensor, new: Tensor) -> Figure:
    """The mean distance at which tokens read, of maps (layers, 2, B, L, L) before and after training."""
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
