"""The splits of a user's own images: those that they have, and those that are drawn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vimtune.data.errors import DatasetError, MissingSplitError
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE
from vimtune.data.own.layout import LAYOUT, Layout, read_layout
from vimtune.data.splitting import stratified_split
from vimtune.text import name_some, printable, quote


@dataclass(frozen=True)
class FoundSplit:
    """One split of a folder."""

    root: Path
    """The folder."""
    images: list[tuple[str, int]]
    """Path and label of every image."""
    classes: list[str]
    """Names of the classes; label `i` means `classes[i]`."""
    source: str
    """Which images these are, in words."""
    notes: list[str]
    """What else is to be said about them, such as files that were left out."""
    tags: list[tuple[int, ...]] | None = None
    """All labels of every image where it may have several, else None."""


def find_split(
    data_dir: Path | None,
    split: str,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    kind: str = "folder",
    expected: str = LAYOUT,
    read: Callable[[Path], Layout] = read_layout,
) -> FoundSplit:
    """Read the folder `data_dir` and take or draw one split of it.

    Args:
        data_dir: the folder; None is refused, because there is no usual place.
        split: "train", "val", "test" or "train+val".
        val_fraction: share of the images that "val" gets where it is drawn.
        test_fraction: share of the images that "test" gets where it is drawn.
        seed: fixes what is drawn.
        kind: name of the data set.
        expected: sentences that tell the user what is understood.
        read: says what is in the folder.

    Raises:
        DatasetError: no folder, fractions that leave nothing, or a layout that is not understood.
        MissingSplitError: the folder has no such split, or it is empty.
    """
    if data_dir is None:
        raise DatasetError(f"the data set {kind!r} needs data_dir. {expected} {EMBEDDED_ALTERNATIVE}")
    shown = printable(str(data_dir))
    if not data_dir.is_dir():
        problem = "is no folder" if data_dir.exists() else "does not exist"
        raise DatasetError(f"data_dir {shown!r} {problem}. {expected} {EMBEDDED_ALTERNATIVE}")
    check_fractions(val_fraction, test_fraction)
    return take_split(
        read(data_dir),
        split,
        root=data_dir,
        shown=shown,
        kind=kind,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise DatasetError if these shares of the images leave none to train on."""
    if val_fraction + test_fraction >= 1:
        raise DatasetError(
            f"val_fraction={val_fraction} + test_fraction={test_fraction} leave no train images."
        )


def take_split(
    layout: Layout,
    split: str,
    *,
    root: Path,
    shown: str,
    kind: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> FoundSplit:
    """Take or draw one split of what was read.

    Args:
        layout: what was read.
        split: as for `find_split`, like `kind`, the fractions and the seed.
        root: the folder of the images.
        shown: what messages call the place of the data.

    Raises:
        MissingSplitError: there is no such split, or it is empty.
    """
    if layout.names:
        images, how, notes = _own_split(layout, root, split, val_fraction, seed, shown)
    else:
        fractions = {"val": val_fraction, "test": test_fraction}
        images = _draw(layout.parts["all"], root, split, fractions, seed)
        how = f"drawn with seed {seed}, val {val_fraction:g}, test {test_fraction:g}"
        notes = layout.notes["all"]
    if not images:
        raise MissingSplitError(
            f"the {split!r} split of {shown} is empty ({how}). Add images, or raise "
            f"{split}_fraction (--dataset-kwargs {split}_fraction=0.3)."
        )
    source = f"{kind} {shown}, {split} split ({how})"
    tags = None if layout.tags is None else [layout.tags[path] for path, _ in images]
    return FoundSplit(root, images, layout.classes, source, [*notes, *_lacking(layout, images)], tags)


def _own_split(
    layout: Layout, root: Path, split: str, val_fraction: float, seed: int, shown: str
) -> tuple[list[tuple[str, int]], str, list[str]]:
    """Take or draw a split of images that are divided already.

    Returns:
        (images, where they come from, notes).
    """
    names = layout.names
    if "train" not in names and split not in names:
        raise MissingSplitError(
            f"{shown} has no images to train on, and none to draw {quote(split)} from: all are of "
            f"{name_some(names)}, which vimtune evaluate can score. Add images of train"
        )
    if split == "test" and "test" not in names:
        unused = "".join(f"; {note}" for note in layout.notes["train"])
        raise MissingSplitError(f"{shown} has {layout.missing.format(split=split, unused=unused)}")
    if split == "test" or (split != "train+val" and "val" in names):
        return layout.parts[split], f"as in {names[split]}", layout.notes[split]
    if split == "train+val":
        parts = [part for part in ("train", "val") if part in names]
        images = [image for part in parts for image in layout.parts[part]]
        return (
            images,
            " and ".join(names[part] for part in parts),
            [n for p in parts for n in layout.notes[p]],
        )
    how = f"val {val_fraction:g} drawn from {names['train']} with seed {seed}"
    images = _draw(layout.parts["train"], root, split, {"val": val_fraction}, seed)
    return images, how, layout.notes["train"]


def _draw(
    images: list[tuple[str, int]], root: Path, split: str, fractions: dict[str, float], seed: int
) -> list[tuple[str, int]]:
    """The images that a stratified draw gives to `split`; those that no fraction takes are "train".

    What is drawn follows from the path of an image below `root`, wherever that folder lies.
    """
    names = [Path(os.path.relpath(path, root)).as_posix() for path, _ in images]
    drawn = stratified_split([label for _, label in images], list(fractions.values()), seed, names)
    parts = dict(zip([*fractions, "train"], drawn, strict=True))
    return [images[i] for part in split.split("+") for i in parts[part]]


def _lacking(layout: Layout, images: list[tuple[str, int]]) -> list[str]:
    """A note about the classes of which `images` has none, if there are such."""
    used = {label for path, own in images for label in (layout.tags[path] if layout.tags else (own,))}
    names = [name for label, name in enumerate(layout.classes) if label not in used]
    return [f"no images of {name_some(names)}"] if names else []
