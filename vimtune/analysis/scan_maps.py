"""What each token reads from where, before training and after it.

`vimtune.analysis.scan_matrix` has the formula, `vimtune.analysis.scan_drawing` the pictures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch

from vimtune.analysis.scan_drawing import DIRECTIONS, draw_matrices, draw_reach, draw_tokens
from vimtune.analysis.scan_matrix import Reach, as_patch_map, read_maps
from vimtune.analysis.subject import Subject
from vimtune.pages.section import Picture, Section, Table
from vimtune.text import counted

__all__ = ["analyze", "as_patch_map", "read_maps"]

LAYERS_SHOWN = 4
"""Layers whose maps the pictures show."""
IMAGES, PAIRS = 4, 2**17
"""At most so many images, and so many pairs of tokens of all images together, but for one image: the matrices
of an image of 224 pixels take a CPU half a minute."""

Row = tuple[int, str, Reach, float]
"""A layer, a direction, how far its tokens read, and which share of what is read training has moved."""


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
        tables=[_table(rows)],
        pictures=[
            Picture(
                "What chosen tokens of one image read after training, over its patches: the class token, "
                "whose place in the sequence is between the two middle patches, and two patches "
                "(outlined). Brighter is more, the scale is that of each map; what a direction cannot read "
                "is grey.",
                draw_tokens(after, images[0], new[:, :, 0], chosen),
            ),
            Picture(
                "All tokens of the same image: the row reads, the column is read; mean of both directions, "
                "logarithmic colours.",
                draw_matrices(new[:, :, 0], chosen),
            ),
            Picture("Mean distance at which tokens read, before and after training.", draw_reach(old, new)),
        ],
    )


def _table(rows: Sequence[Row]) -> Table:
    return Table(
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


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(statistics.mean(getattr(reach, name) for _, _, reach, _ in rows))


def _spread_out(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly, the first and the last among them."""
    count = min(count, total)
    return sorted({round(part * (total - 1) / max(count - 1, 1)) for part in range(count)})
