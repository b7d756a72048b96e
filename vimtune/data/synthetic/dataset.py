"""The data set `synthetic_flowers`: which species, splits and images there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from vimtune.data.base import ImageDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.text import counted

if TYPE_CHECKING:
    from PIL import Image

_MAX_SPECIES = 100_000
"""Largest number of classes."""
_MAX_IMAGES = 10_000_000
"""Largest number of images of a split."""
_LAST_OFFSET = 1_000_000_000 - _MAX_SPECIES
"""Largest `species_offset`: the species from 1,000,000,000 on are seen only far behind a subject."""
PerSpecies = Annotated[int, Ge(1), Le(_MAX_IMAGES)]
"""Number of images of each species."""


@register_dataset("synthetic_flowers")
class SyntheticFlowers(ImageDataset):
    """Generated flowers. Options:

    - species: number of classes, 2 to 100,000.
    - train_per_species, val_per_species, test_per_species: images per class.
    - species_offset: first species; disjoint ranges give disjoint sets, e.g. for pretraining.
    """

    summary = "embedded generator of fine-grained flowers (no files; any number of species)"
    kind = "generated drawings"
    reads_files = False

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        species: Annotated[int, Ge(2), Le(_MAX_SPECIES)] = 16,
        train_per_species: PerSpecies = 64,
        val_per_species: PerSpecies = 16,
        test_per_species: PerSpecies = 32,
        species_offset: Annotated[int, Ge(0), Le(_LAST_OFFSET)] = 0,
    ) -> None:
        # This comes late, because data sets are listed without numpy.
        from vimtune.data.synthetic.species import species_name

        del data_dir, download
        sizes = {"train": train_per_species, "val": val_per_species, "test": test_per_species}
        num_images = species * sum(sizes[part] for part in split.split("+"))
        if num_images > _MAX_IMAGES:
            raise DatasetError(
                f"{num_images:,} images in the {split!r} split are more than {_MAX_IMAGES:,}: "
                f"lower species or the images per species."
            )
        if len(img_size) != 2 or min(img_size) < 8:
            raise DatasetError(
                f"img_size={tuple(img_size)} must be (height, width) of at least 8 pixels each."
            )
        self.split = split
        self._seed = seed
        self._img_size = (int(img_size[0]), int(img_size[1]))
        self._species, self._offset = species, species_offset
        self._counts = {part: sizes[part] for part in split.split("+")}
        self.targets = [
            label for count in self._counts.values() for label in range(species) for _ in range(count)
        ]
        self.classes = [species_name(seed, n) for n in range(species_offset, species_offset + species)]
        self.source = (
            f"generated flowers, {split} split, seed {seed}, species {species_offset} to "
            f"{species_offset + species - 1}, {counted(len(self.targets), 'images')} of "
            f"{counted(species, 'classes')}"
        )

    def _locate(self, index: int) -> tuple[int, str, int]:
        """Species, split and number of image `index`."""
        for part, count in self._counts.items():
            if index < self._species * count:
                return self._offset + index // count, part, index % count
            index -= self._species * count
        raise IndexError("beyond the last image")

    def load(self, index: int) -> Image.Image:
        """Paint image `index`."""
        # This comes late, because data sets are listed without numpy.
        from vimtune.data.synthetic.scene import render_flower

        number, part, i = self._locate(index)
        return render_flower(self._seed, number, part, i, self._img_size)

    def describe(self, index: int) -> str:
        """Split, species and number of image `index`."""
        number, part, i = self._locate(index)
        return f"synthetic {part} {number}/{i}"

    def fingerprint(self) -> str:
        """Hash of the images' descriptions and labels, with the seed and size from which they are painted."""
        return f"seed {self._seed}, {self._img_size[0]}x{self._img_size[1]}: {super().fingerprint()}"
