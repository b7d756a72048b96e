"""What the examples beside this file share: embedded data, a pretrained Vim with an adapter, and its file.

Nothing here knows Lightning or Accelerate. To use your own data, change `RECIPE`: the functions below take
the data set, the model and the adapter from there, and the adapter file says it to `vimtune evaluate`.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vimtune
from vimtune.data import ImageDataset, build_transform
from vimtune.data.transforms import Transform

RECIPE = vimtune.Recipe(
    dataset="synthetic_flowers",
    dataset_kwargs={"species": 4, "train_per_species": 24, "val_per_species": 8, "test_per_species": 8},
    model="vim_nano_patch8_64.synthetic_flowers",
    peft="lora",
    rank=8,
    epochs=2,
    batch_size=16,
    lr=5e-3,
)
"""Data, model, adapter and the numbers of the training."""


class Images(Dataset[tuple[Tensor, int]]):
    """A data set of vimtune as one of torch: pairs of an image (3, H, W) and the number of its class."""

    def __init__(self, dataset: ImageDataset, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed = int(torch.randint(2**31, ()))  # of the augmentation
        return self.transform(self.dataset.load(index), seed), self.dataset.label(index)


def open_images(split: str, model: nn.Module) -> Images:
    """The images of a split as the model wants them, those to train on with a light augmentation."""
    config, data = model.pretrained_cfg, RECIPE.data
    size = config["input_size"][1:]
    transform = build_transform(
        "light" if split == "train" else "none",
        size,
        config["mean"],
        config["std"],
        train=split == "train",
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
    )
    return Images(
        vimtune.create_dataset(data.dataset, split, img_size=size, **data.dataset_kwargs), transform
    )


def build_model(num_classes: int) -> nn.Module:
    """The pretrained model, of which the adapter and the head alone have `requires_grad`."""
    model = timm.create_model(RECIPE.backbone.model, pretrained=True, num_classes=num_classes)
    vimtune.inject(model, RECIPE.method.peft, **RECIPE.method.method_kwargs)
    print(vimtune.summary(model))
    return model


def build_loader(images: Images, shuffle: bool = False) -> DataLoader[tuple[Tensor, int]]:
    """Batches of images."""
    return DataLoader(images, RECIPE.optimisation.batch_size, shuffle=shuffle)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW for what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, RECIPE.optimisation.lr, weight_decay=RECIPE.optimisation.weight_decay)


def save(model: nn.Module, images: Images, path: Path) -> None:
    """Write the adapter with its head, the names of the classes and the preprocessing.

    With the recipe the file says which data it was trained on, so that `vimtune evaluate` and `predict` need
    nothing else.
    """
    vimtune.save_adapter(
        model,
        path,
        classes=images.dataset.classes,
        preprocessing=images.transform.config,
        extra={"recipe": RECIPE.to_share()},
    )
    print(f"saved {path}")


@torch.inference_mode()
def accuracy(path: Path, split: str = "test") -> float:
    """Load the adapter into a fresh model, and count the right answers in percent."""
    info = vimtune.read_adapter_info(path)
    model = timm.create_model(RECIPE.backbone.model, pretrained=True, num_classes=len(info.classes)).eval()
    vimtune.load_adapter(model, path)
    images = open_images(split, model)
    right = sum(int((model(batch).argmax(1) == labels).sum()) for batch, labels in build_loader(images))
    return 100 * right / len(images)
