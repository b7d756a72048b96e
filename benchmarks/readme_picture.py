"""The picture of the README, from what `python train_vim.py` has left in its folder.

    python train_vim.py
    python benchmarks/readme_picture.py runs/quickstart -o docs/images/quickstart.png

Above, the scores in training of the linear probe and of ProDiaL, and answers on test images. Below, what the
class token in the middle of the sequence reads from where, in some layers of the adapted model: the forward
scan brings it the upper half of an image, the reverse scan the lower half.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import matplotlib.image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import vimtune
from vimtune.analysis.scan_maps import as_patch_map, read_maps
from vimtune.pages.style import picture_style

LAYERS = (1, 5, 9)
"""Layers whose maps are shown."""
IMAGES = 3
"""Images whose maps are shown."""


def run_of(folder: Path, method: str) -> Path:
    """The run folder of a method."""
    (report,) = folder.glob(f"runs/*/{method}/*/report.json")
    return report.parent


def draw_scores(axes: Axes, folder: Path) -> None:
    """Scores on the validation images over the epochs, as shares of all epochs."""
    for method, name, color, height in (
        ("prodial", "ProDiaL", "C2", 0.3),
        ("linear", "linear probe", "C0", 0.1),
    ):
        report = json.loads((run_of(folder, method) / "report.json").read_text())
        points = [(each["epoch"], each["top1"]) for each in report["history"] if each.get("top1") is not None]
        shares = [100 * epoch / points[-1][0] for epoch, _ in points]
        axes.plot(shares, [score for _, score in points], color=color, linewidth=2)
        size = report["adapter_bytes"] / 1000
        text = f"{name}: {report['top1']:.1f} % of test images,\nadapter of {size:,.0f} kB"
        axes.text(0.97, height, text, color=color, ha="right", transform=axes.transAxes)
    axes.set(xlabel="training, %", ylabel="top-1 on validation images, %")
    axes.grid(alpha=0.3)


def class_token_map(model: torch.nn.Module, maps: Tensor, layer: int, image: int) -> Tensor:
    """What the class token reads over the patches, from both directions."""
    place = model.cls_position
    forward, reverse = maps[layer, :, image, place]
    return as_patch_map(model, torch.cat([forward[: place + 1], reverse[place + 1 :]]))


def draw(folder: Path) -> Figure:
    """The picture."""
    run = run_of(folder, "prodial")
    predictor = vimtune.load_predictor(run, device="cpu")
    model = predictor.model
    data = vimtune.create_dataset("synthetic_flowers", "test")
    step = len(data) // IMAGES
    images = torch.stack([predictor.transform(data.load(number * step + 1)) for number in range(IMAGES)])
    with torch.no_grad():
        maps = read_maps(model, images)
    with picture_style():
        figure = Figure(figsize=(13, 6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[3.4, 1.3])
        left, right = above.subplots(1, 2, width_ratios=[1, 2])
        draw_scores(left, folder)
        examples = matplotlib.image.imread(run / "examples.png")
        right.imshow(examples[: len(examples) * 3 // 4])  # two rows of right answers, one of wrong ones
        right.axis("off")
        grid = below.subplots(1, IMAGES * (len(LAYERS) + 1))
        for image in range(IMAGES):
            axes, *others = grid[image * (len(LAYERS) + 1) :][: len(LAYERS) + 1]
            low, high = images[image].amin(), images[image].amax()
            axes.imshow(((images[image] - low) / (high - low)).permute(1, 2, 0))
            for place, layer in zip(others, LAYERS, strict=True):
                place.imshow(class_token_map(model, maps, layer, image), cmap="inferno", vmin=0)
                place.set_title(f"layer {layer}", fontsize=9)
        for axes in grid:
            axes.set(xticks=[], yticks=[])
        below.suptitle("What the class token reads from where", fontsize=11)
        return figure


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="that of `python train_vim.py`")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/quickstart.png"))
    given = parser.parse_args()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    draw(given.folder).savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(256).save(given.output, optimize=True)
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
