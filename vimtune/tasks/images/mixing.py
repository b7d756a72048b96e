"""Mixup and CutMix of a batch, and the loss of a classifier. B batch, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from vimtune.runtime.seeds import numpy_seed


class BatchMixer:
    """timm's Mixup/CutMix as a pure function of the batch and a seed; with both alphas 0 it does nothing.

    Images are paired from the two ends of the batch, so the last image of an odd batch stays as it
    is. Each process mixes its own share of a batch.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        self.num_classes = num_classes
        # Label smoothing belongs to the loss, which treats mixed and plain labels alike.
        self.mix = (
            Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_classes)
            if mixup > 0 or cutmix > 0
            else None
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, 3, H, W) and targets: labels (B,) unmixed, or shares (B, C)."""
        if self.mix is None:
            return images, labels
        even = len(images) - len(images) % 2
        if even == 0:
            return images, F.one_hot(labels, self.num_classes).float()
        with numpy_seed(seed):
            mixed, targets = self.mix(images[:even].clone(), labels[:even])
        rest = F.one_hot(labels[even:], self.num_classes).to(targets.dtype)
        return torch.cat([mixed, images[even:]]), torch.cat([targets, rest])


def summed_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Cross entropy summed over the batch, in fp32; `targets` are labels (B,) or shares (B, C), and `weights`
    (C,) those of the classes.

    A sum rather than a mean: parts of a batch, on several processes or in several micro-batches,
    then add up to the whole whatever their sizes.
    """
    return F.cross_entropy(
        logits.float(), targets, weight=weights, label_smoothing=label_smoothing, reduction="sum"
    )
