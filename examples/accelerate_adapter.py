"""Train an adapter with a loop of your own under Hugging Face Accelerate.

    pip install "vimtune[integrations]"
    accelerate launch examples/accelerate_adapter.py --output flowers.safetensors
    vimtune evaluate --adapter flowers.safetensors

Vimtune gives the model, the adapter and the file; Accelerate places them on one device or several.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flowers
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional

from vimtune import adapters


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and check the file."""
    parser = argparse.ArgumentParser(description="train an adapter with Accelerate")
    parser.add_argument("--output", type=Path, default=Path("accelerate.safetensors"))
    parser.add_argument("--cpu", action="store_true", help="do not look for a GPU")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=options.cpu)
    set_seed(0)
    recipe = flowers.RECIPE
    model = flowers.build_model(recipe.data.dataset_kwargs["species"])
    images = {split: flowers.open_images(split, model) for split in ("train", "val")}
    loaders = [flowers.build_loader(each, shuffle=split == "train") for split, each in images.items()]
    prepared, optimizer, train, val = accelerator.prepare(model, flowers.build_optimizer(model), *loaders)
    for epoch in range(recipe.optimisation.epochs):
        prepared.train()
        for number, (batch, labels) in enumerate(train):
            loss = functional.cross_entropy(prepared(batch), labels)
            accelerator.backward(loss)
            if epoch == number == 0:  # Everything that is to be trained has a gradient now.
                adapters.check_gradients(accelerator.unwrap_model(prepared))
            optimizer.step()
            optimizer.zero_grad()
        prepared.eval()
        right = []
        with torch.inference_mode():
            for batch, labels in val:
                right.append(accelerator.gather_for_metrics(prepared(batch).argmax(1) == labels))
        top1 = 100 * float(torch.cat(right).float().mean())
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}, val top-1 {top1:.2f} %")
    if accelerator.is_main_process:
        flowers.save(accelerator.unwrap_model(prepared), images["val"], options.output)
        print(f"top-1 on the test split: {flowers.accuracy(options.output):.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
