"""Any folder of images with one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError, MissingSplitError
from vimtune.data.layout import LAYOUT, Layout, name_some, read_layout
from vimtune.data.placement import EMBEDDED_ALTERNATIVE
from vimtune.data.splitting import stratified_split
from vimtune.text import printable

Share = Annotated[float, Ge(0), Lt(1)]


@register_dataset("folder")
class Folder(FileDataset):
    """Images sorted into class folders, with their own splits or splits drawn here.

    - `root/train/<class>/...` with `root/val` and `root/test`: used as they are. Without `val`, a stratified
      `val_fraction` of train is drawn; without `test`, asking for "test" raises `MissingSplitError`.
    - `root/<class>/...`: a stratified draw of `val_fraction` and `test_fraction`; the rest is train.

    Draws are a pure function of the sorted files and `seed`. Class names are the folder names. Which folder
    names are understood and what is refused is said in `vimtune.data.layout`.
    """

    summary = "your own images: one folder per class, with or without train/val/test"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        val_fraction: Share = 0.15,
        test_fraction: Share = 0.15,
    ) -> None:
        del img_size, download
        if data_dir is None:
            raise DatasetError(f"the data set 'folder' needs data_dir. {LAYOUT} {EMBEDDED_ALTERNATIVE}")
        shown = printable(str(data_dir))
        if not data_dir.is_dir():
            problem = "is no folder" if data_dir.exists() else "does not exist"
            raise DatasetError(f"data_dir {shown!r} {problem}. {LAYOUT} {EMBEDDED_ALTERNATIVE}")
        if val_fraction + test_fraction >= 1:
            raise DatasetError(
                f"val_fraction={val_fraction} + test_fraction={test_fraction} leave no train images."
            )
        layout = read_layout(data_dir)
        if layout.folders:
            images, how, notes = _own_split(layout, split, val_fraction, seed, shown)
        else:
            fractions = {"val": val_fraction, "test": test_fraction}
            images = _draw(layout.parts["all"], split, fractions, seed)
            how = f"drawn with seed {seed}, val {val_fraction:g}, test {test_fraction:g}"
            notes = layout.notes["all"]
        if not images:
            raise MissingSplitError(
                f"the {split!r} split of {shown} is empty ({how}). Add images or raise {split}_fraction."
            )
        paths, targets = [path for path, _ in images], [label for _, label in images]
        self._set_files(
            split,
            data_dir,
            paths,
            targets,
            layout.classes,
            f"folder {shown}, {split} split ({how})",
            [*notes, *_lacking(layout, targets)],
        )


def _own_split(
    layout: Layout, split: str, val_fraction: float, seed: int, shown: str
) -> tuple[list[tuple[str, int]], str, list[str]]:
    """Images of a split of a divided folder, where they come from, and what is to say about that."""
    if split == "test" and "test" not in layout.folders:
        unused = "".join(f"; {note}" for note in layout.notes["train"])
        raise MissingSplitError(f"{shown} has no test folder{unused}. {LAYOUT}")
    names = {part: f"{printable(folder)}/" for part, folder in layout.folders.items()}
    if split == "test" or (split != "train+val" and "val" in layout.folders):
        return layout.parts[split], f"as in {names[split]}", layout.notes[split]
    if split == "train+val":
        parts = [part for part in ("train", "val") if part in layout.folders]
        images = [image for part in parts for image in layout.parts[part]]
        return (
            images,
            " and ".join(names[part] for part in parts),
            [n for p in parts for n in layout.notes[p]],
        )
    how = f"val {val_fraction:g} drawn from {names['train']} with seed {seed}"
    return _draw(layout.parts["train"], split, {"val": val_fraction}, seed), how, layout.notes["train"]


def _draw(
    images: list[tuple[str, int]], split: str, fractions: dict[str, float], seed: int
) -> list[tuple[str, int]]:
    """The images that a stratified draw gives to `split`; what no fraction takes is train."""
    drawn = stratified_split([label for _, label in images], list(fractions.values()), seed)
    parts = dict(zip([*fractions, "train"], drawn, strict=True))
    return [images[i] for part in split.split("+") for i in parts[part]]


def _lacking(layout: Layout, targets: list[int]) -> list[str]:
    used = set(targets)
    names = [name for label, name in enumerate(layout.classes) if label not in used]
    return [f"no images of {name_some(names)}"] if names else []
