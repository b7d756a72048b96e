"""Make copies of image data sets with a short side of 64 pixels, for benchmarks/image_methods.yaml.

    python benchmarks/small_sets.py groceries CHECKOUT sets/groceries
    python benchmarks/small_sets.py rsscn7 CHECKOUT sets/rsscn7
    python benchmarks/small_sets.py copy data/stanford_cars sets/stanford_cars
    python benchmarks/small_sets.py copy data/caltech101 sets/caltech101

`groceries` takes a checkout of https://github.com/marcusklasson/GroceryStoreDataset: 81 classes of fruit,
vegetables and packages in shops, in the official splits (2,640 images for training, 296 for validation, 2,485
for the test). `rsscn7` takes one of https://github.com/palewithout/RSSCN7: 7 kinds of land seen from above,
400 images each. The latter has no official split. As in its literature half of the images are for the test,
here those with an even number, which are spread evenly over the four scales of the data set; of the others
every second one is for validation. Both become folders that `--dataset folder` reads. `copy`
keeps the layout of a data set and everything in it that is no image. Scores on such copies do not compare
with published ones of the originals.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

SIDE = 64
"""Pixels of the short side of a copy; smaller images stay as they are."""
QUALITY = 90
"""Of the JPEG files."""

Files = Iterator[tuple[Path, Path]]
"""Files of a data set, each with its path within the copy."""


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    source, target = Path(sys.argv[2]), Path(sys.argv[3])
    count = size = 0
    for path, place in SETS[sys.argv[1]](source):
        copy = target / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shrink(path, copy)
        count, size = count + 1, size + copy.stat().st_size
    if count == 0:
        sys.exit(f"error: {source} has no files of this data set")
    print(f"{target}: {count} files, {size / 1e6:.1f} MB")


def shrink(path: Path, copy: Path) -> None:
    """Write a file's copy: an image with a short side of at most `SIDE`, everything else as it is."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        shutil.copyfile(path, copy)
        return
    with Image.open(path) as image:
        if min(image.size) <= SIDE:
            shutil.copyfile(path, copy)
            return
        factor = SIDE / min(image.size)
        width, height = (max(SIDE, round(side * factor)) for side in image.size)
        image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(
            copy, "JPEG", quality=QUALITY, optimize=True
        )


def groceries(checkout: Path) -> Files:
    """The images that the official lists name, below split and fine class."""
    for split in ("train", "val", "test"):
        for line in (checkout / "dataset" / f"{split}.txt").read_text(encoding="utf-8").splitlines():
            name = line.split(",")[0].strip()
            if name:
                path = checkout / "dataset" / name
                yield path, Path(split) / path.parent.name / path.name


def rsscn7(checkout: Path) -> Files:
    """All images, below a split that the number in their names decides and the name of their class."""
    for folder in sorted(path for path in checkout.iterdir() if path.is_dir() and path.name[0] in "abcdefg"):
        for path in sorted(folder.glob("*.jpg")):
            number = int(path.stem[1:])
            split = ("test", "train", "test", "val")[number % 4]
            yield path, Path(split) / folder.name[1:] / path.name


def copy(folder: Path) -> Files:
    """Every file at its own place."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield path, path.relative_to(folder)


SETS: dict[str, Callable[[Path], Files]] = {"groceries": groceries, "rsscn7": rsscn7, "copy": copy}
"""What can be made, by the name on the command line."""

if __name__ == "__main__":
    main()
