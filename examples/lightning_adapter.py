"""Train an adapter with Lightning's loop.

    pip install "vimtune[integrations]"
    python examples/lightning_adapter.py --output flowers.safetensors
    vimtune evaluate --adapter flowers.safetensors

Vimtune gives the model, the adapter and the file; the loop, its devices, loggers and callbacks are those of
Lightning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flowers
import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional

from vimtune import adapters


class Adapted(lightning.LightningModule):
    """A model with an adapter, trained by cross entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = functional.cross_entropy(self.model(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """The share of right answers."""
        images, labels = batch
        right = (self.model(images).argmax(1) == labels).float().mean()
        self.log("val/top1", 100 * right, prog_bar=True, batch_size=len(labels))

    def on_after_backward(self) -> None:
        """Make sure, once, that everything that is to be trained gets a gradient."""
        if self.global_step == 0:
            adapters.check_gradients(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What is trained is what `vimtune.inject` left with `requires_grad`."""
        return flowers.build_optimizer(self.model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and check the file."""
    parser = argparse.ArgumentParser(description="train an adapter with Lightning's loop")
    parser.add_argument("--output", type=Path, default=Path("lightning.safetensors"))
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, mps")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    recipe = flowers.RECIPE
    model = flowers.build_model(recipe.data.dataset_kwargs["species"])
    train, val = (flowers.open_images(split, model) for split in ("train", "val"))
    trainer = lightning.Trainer(
        max_epochs=recipe.optimisation.epochs,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,  # The adapter is all that changes, and `flowers.save` keeps it.
        log_every_n_steps=1,
    )
    loaders = flowers.build_loader(train, shuffle=True), flowers.build_loader(val)
    trainer.fit(Adapted(model), *loaders)
    flowers.save(model, val, options.output)
    print(f"top-1 on the test split: {flowers.accuracy(options.output):.2f} %")


if __name__ == "__main__":
    main()
