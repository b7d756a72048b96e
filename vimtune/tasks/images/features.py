"""Training a head on features that are computed once. B batch, D width.

Where the head alone is trained and nothing is drawn at random before it, the features of an image are the
same in every epoch. They are computed once for each image, and an epoch is then a matter of small products.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.runtime.precision import Autocast, in_precision
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.job import Batch, Loader
from vimtune.text import counted

logger = logging.getLogger(__name__)


def repeats_its_features(model: Any) -> bool:
    """Whether a model that is not trained gives an image the same features in training mode every time, and
    has timm's way to get them."""
    options = getattr(model, "creation", {}).get("kwargs", {})
    asked_to_draw = any(value for name, value in options.items() if "drop" in name)
    # Dropout of torch has its probability in `p`, stochastic depth of timm in `drop_prob`.
    draws = any(
        (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or getattr(module, "drop_prob", 0)
        or isinstance(module, nn.modules.batchnorm._BatchNorm)
        for module in model.modules()
    )
    has_features = hasattr(model, "forward_features") and hasattr(model, "forward_head")
    return has_features and not asked_to_draw and not draws


class ImagesOrFeatures(nn.Module):
    """A classifier that takes features in the place of images, too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits for images (B, 3, H, W), or for what `features` made of them, (B, D)."""
        logits: Tensor = self.model(inputs) if inputs.dim() > 2 else self.model.get_classifier()(inputs)
        return logits

    def features(self, images: Tensor) -> Tensor:
        """What the head of the model works on, (B, D), for images (B, 3, H, W)."""
        features: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features


class FeatureBatches(Loader):
    """Batches of a split with features in the place of images, under the same name."""

    def __init__(
        self, images: ImageBatches, order: BatchSampler, model: ImagesOrFeatures, autocast: Autocast
    ) -> None:
        """Prepare to compute the features of a split when they are first needed.

        Args:
            images: all images of the split in the same batches, none left out.
            order: which of them make which batch.
            model: gives the features, on the device where it then is.
            autocast: opens the block in which it computes.
        """
        self.dataset = images.dataset
        self.split, self.source, self.num_examples = images.split, images.source, images.num_examples
        self.num_workers, self.reading = images.num_workers, images.reading
        self._images, self._order, self._model, self._autocast = images, order, model, autocast
        self._found: tuple[Tensor, Tensor] | None = None

    @property
    def originals(self) -> Loader:
        """The images."""
        return self._images

    def fingerprint(self) -> str:
        """A hash that changes when the images of the split do."""
        return self._images.fingerprint()

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        self._order.epoch, self._order.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._order.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; computes the features before the first one.

        Raises:
            InputError: an image cannot be read.
        """
        if self._found is None:
            self._found = self._compute()
        features, labels = self._found
        for keys in self._order:
            chosen = torch.tensor([key.image for key in keys], device=features.device)
            tensors = {"images": features[chosen], "labels": labels[chosen], "places": chosen}
            yield Batch(tensors, len(keys))

    @torch.no_grad()
    def _compute(self) -> tuple[Tensor, Tensor]:
        """The features (number of images, D) and the labels of all images in the order of the data set."""
        device = next(self._model.parameters()).device
        compute = in_precision(self._model.features, self._autocast)
        features, labels = [], []
        self._images.set_position(0)
        for batch in self._images:
            tensors = batch.to(device).tensors
            features.append(compute(tensors["images"]))
            labels.append(tensors["labels"])
        self._images.close()
        images = counted(self.num_examples, "images")
        logger.info("features of %s of %r computed once", images, self.split)
        read = np.concatenate(list(self._order.shares(epoch=0, start_batch=0)))
        places = torch.from_numpy(read).to(device).argsort()
        return torch.cat(features)[places], torch.cat(labels)[places]

    def close(self) -> None:
        """End the processes that prepare images."""
        self._images.close()
