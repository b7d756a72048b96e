"""Centred kernel alignment (CKA) of the features of each block before and after training.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) compares two sets of features of the same n images by
their Gram matrices K = X X^T and L = Y Y^T. It is estimated over minibatches by the unbiased HSIC of Song et
al. (2012), as Nguyen et al. do (2021, arXiv 2010.15327, equation 3): the estimate does not depend on the size
of the minibatches, and wide features do not look alike merely because there are few images.

Shape letters: n images of a minibatch, P numbers of a feature, F and G sets of features (blocks).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vimtune.analysis.subject import NotApplicable, Subject
from vimtune.models import VisionMamba
from vimtune.pages.section import Picture, Section, Table
from vimtune.pages.style import picture_style, whole_numbers
from vimtune.text import counted

FEWEST = 4
"""The unbiased HSIC needs at least so many images in a minibatch."""


def gram_matrices(features: Iterable[Tensor]) -> Tensor:
    """F sets of features (n, P) to X X^T without its diagonal, (F, n, n), in double precision."""
    wide = (each.double() for each in features)
    return torch.stack([(each @ each.T).fill_diagonal_(0) for each in wide])


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC_1 of each pair (Song et al. 2012, equation 5) of `gram_matrices` (F, n, n) and (G, n, n).

        [tr(K L) + (1'K 1)(1'L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1] / (n (n - 3))

    Returns (F, G).

    Raises:
        ValueError: fewer than `FEWEST` images.
    """
    count = first.shape[-1]
    if count < FEWEST:
        raise ValueError(f"unbiased HSIC of {count} images: expected at least {FEWEST}")
    traces = torch.einsum("fij,gij->fg", first, second)  # symmetric, so that tr(K L) is a sum of products
    rows, others = first.sum(-1), second.sum(-1)
    sums = torch.outer(rows.sum(-1), others.sum(-1)) / ((count - 1) * (count - 2))
    return (traces + sums - 2 / (count - 2) * rows @ others.T) / (count * (count - 3))


class MinibatchCka:
    """CKA of each pair of sets of features, from minibatches that are added one by one."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        """Add a minibatch: F sets (n, P) and G sets (n, Q) of features of the same n images.

        Raises:
            ValueError: fewer than `FEWEST` images.
        """
        left, right = gram_matrices(first), gram_matrices(second)
        found = (
            unbiased_hsic(left, right),
            unbiased_hsic(left, left).diagonal(),
            unbiased_hsic(right, right).diagonal(),
        )
        before = self._sums or tuple(torch.zeros_like(each) for each in found)
        cross, own, others = (total + each for total, each in zip(before, found, strict=True))
        self._sums = cross, own, others

    def value(self) -> Tensor:
        """CKA (F, G) on the CPU. It is NaN where features do not differ between images. Being unbiased, it
        may lie a little below 0 or above 1.

        Raises:
            ValueError: there was no minibatch.
        """
        if self._sums is None:
            raise ValueError("CKA of no images: expected at least one minibatch")
        cross, own, others = self._sums
        return (cross / torch.outer(own.clamp(min=0).sqrt(), others.clamp(min=0).sqrt())).cpu()


@torch.no_grad()
def block_features(model: VisionMamba, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all blocks for images (n, C, H, W).

    Returns:
        For each block all patch tokens of an image as one feature (n, M D), and the class token (n, D).
    """
    maps = model.forward_intermediates(
        images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert isinstance(maps, list)
    return [patches.flatten(1) for patches, _ in maps], [token[:, 0] for _, token in maps]


def analyze(subject: Subject) -> Section:
    """CKA between the blocks of the model before and after training, on the test images."""
    before, after = subject.vims()
    batches = [images for images in subject.images() if len(images) >= FEWEST]
    if not batches:
        raise NotApplicable(f"it needs at least {FEWEST} images at a time: raise --images or --batch-size")
    of_patches, of_classes = MinibatchCka(), MinibatchCka()
    for images in batches:
        old, new = block_features(before, images), block_features(after, images)
        of_patches.add(old[0], new[0])
        of_classes.add(old[1], new[1])
    patches, classes = of_patches.value(), of_classes.value()
    same = patches.diagonal().tolist(), classes.diagonal().tolist()
    count = sum(map(len, batches))
    return Section(
        title="Features before and after (CKA)",
        explanation="Linear centred kernel alignment of the outputs of each block, by the unbiased "
        "estimate over minibatches: 1 where the images lie in the same way to each other up to rotation "
        "and scale, 0 where they have nothing in common. The features of an image are its patch tokens, "
        "and apart from these its class token, which the head reads.",
        findings=[
            f"The patch tokens of a block have CKA {min(same[0]):.3f} (block {same[0].index(min(same[0]))}) "
            f"to {max(same[0]):.3f} with those before training, after the last block {same[0][-1]:.3f}; the "
            f"class token has {same[1][-1]:.3f} there ({counted(count, 'images')})."
        ],
        numbers={
            "images": count,
            "patch_tokens": patches.tolist(),
            "class_token": classes.tolist(),
        },
        tables=[
            Table(
                "The same block before and after",
                ["block", "patch tokens", "class token"],
                [
                    [str(block), f"{a:.4f}", f"{b:.4f}"]
                    for block, (a, b) in enumerate(zip(*same, strict=True))
                ],
            )
        ],
        pictures=[
            Picture(
                "Left: each block before training with each block afterwards, patch tokens. Right: the same "
                "block before and after.",
                _draw(patches, same),
            )
        ],
    )


def _draw(patches: Tensor, same: Sequence[Sequence[float]]) -> Figure:
    with picture_style():
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        picture = left.imshow(patches.numpy(), origin="lower", vmin=0, vmax=1, cmap="magma")
        left.set(xlabel="block after", ylabel="block before")
        figure.colorbar(picture, ax=left, label="CKA")
        for values, name in zip(same, ("patch tokens", "class token"), strict=True):
            right.plot(values, marker="o", markersize=3, label=name)
        right.set(xlabel="block", ylabel="CKA before / after", ylim=(min(0.0, *map(min, same)), 1.03))
        right.xaxis.set_major_locator(whole_numbers())
        right.grid(alpha=0.3)
        right.legend()
        return figure
