"""Any folder of images with one sub-folder per class."""

from __future__ import annotations

from pathlib import Path

from vimtune.data.base import (
    EMBEDDED_ALTERNATIVE,
    FileDataset,
    register_dataset,
    stratified_split,
)
from vimtune.data.errors import DatasetError, MissingSplitError
from vimtune.data.images import EXTENSIONS, find_images

_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_LAYOUT = (
    "Expected <data-dir>/<class>/*.jpg (split for you), or <data-dir>/train/<class>/*.jpg with val/ and "
    f"test/ of the same classes beside it. Image types: {' '.join(EXTENSIONS)}."
)


@register_dataset("folder")
class Folder(FileDataset):
    """Images sorted into class folders, with their own splits or splits drawn here.

    - `root/train/<class>/...` with `root/val` and `root/test`: used as they are. Without `val`, a stratified
      `val_fraction` of train is drawn; without `test`, asking for "test" raises `MissingSplitError`.
    - `root/<class>/...`: a stratified draw of `val_fraction` and `test_fraction`; the rest is train.

    Draws are a pure function of the sorted files and `seed`. A class folder may hold sub-folders. Class names
    are the folder names.
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
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        del img_size, download
        if data_dir is None:
            raise DatasetError(f"the data set 'folder' needs data_dir. {_LAYOUT} {EMBEDDED_ALTERNATIVE}")
        if not data_dir.is_dir():
            problem = "is no folder" if data_dir.exists() else "does not exist"
            raise DatasetError(f"data_dir {str(data_dir)!r} {problem}. {_LAYOUT} {EMBEDDED_ALTERNATIVE}")
        for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= value < 1:
                raise DatasetError(f"{key}={value} must lie in [0, 1).")
        if val_fraction + test_fraction >= 1:
            raise DatasetError(
                f"val_fraction={val_fraction} + test_fraction={test_fraction} leave no train images."
            )

        folders = _split_folders(data_dir)
        if "train" in folders:
            paths, targets, classes, how = _read_own_splits(folders, split, val_fraction, seed)
        elif folders:
            raise DatasetError(f"{data_dir} has {', '.join(sorted(folders))} but no train folder. {_LAYOUT}")
        else:
            paths, targets, classes = _scan(data_dir)
            val, test, train = stratified_split(targets, [val_fraction, test_fraction], seed)
            parts = {"train": train, "val": val, "test": test}
            chosen = [i for part in split.split("+") for i in parts[part]]
            paths, targets = [paths[i] for i in chosen], [targets[i] for i in chosen]
            how = f"drawn with seed {seed}, val {val_fraction:g}, test {test_fraction:g}"
        if not paths:
            raise MissingSplitError(
                f"the {split!r} split of {data_dir} is empty ({how}). Add images or raise {split}_fraction."
            )
        self._set_files(split, data_dir, paths, targets, classes, f"folder {data_dir}, {split} split ({how})")


def _split_folders(root: Path) -> dict[str, Path]:
    """Split name -> folder, for the split folders that hold class folders themselves.

    A class may be called "train": without sub-folders it is a class.
    """
    found = {}
    for split, names in _ALIASES.items():
        for name in names:
            if (root / name).is_dir() and any(entry.is_dir() for entry in (root / name).iterdir()):
                found[split] = root / name
                break
    return found


def _read_own_splits(
    folders: dict[str, Path], split: str, val_fraction: float, seed: int
) -> tuple[list[str], list[int], list[str], str]:
    paths, targets, classes = _scan(folders["train"])
    how = f"as in {folders[split].name}/" if split in folders else "all of train/"
    if split in ("val", "test") and split in folders:
        paths, targets, own = _scan(folders[split])
        if own != classes:
            missing, extra = sorted(set(classes) - set(own)), sorted(set(own) - set(classes))
            raise DatasetError(
                f"{folders[split]} must have the classes of {folders['train']}: "
                f"missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}."
            )
    elif split == "test":
        raise MissingSplitError(f"{folders['train'].parent} has no test folder. {_LAYOUT}")
    elif "val" in folders and split == "train+val":
        more_paths, more_targets, _ = _read_own_splits(folders, "val", val_fraction, seed)[:3]
        paths, targets, how = paths + more_paths, targets + more_targets, "train/ and val/"
    elif "val" not in folders and split != "train+val":
        val, train = stratified_split(targets, [val_fraction], seed)
        chosen = val if split == "val" else train
        paths, targets = [paths[i] for i in chosen], [targets[i] for i in chosen]
        how = f"val {val_fraction:g} drawn from train/ with seed {seed}"
    return paths, targets, classes, how


def _scan(root: Path) -> tuple[list[str], list[int], list[str]]:
    """Sorted image paths, their class indices, and the sorted class names below `root`."""
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not classes:
        raise DatasetError(f"{root} has no class folders. {_LAYOUT}")
    paths, targets, empty = [], [], []
    for label, name in enumerate(classes):
        images = _images_below(root / name)
        if not images:
            empty.append(str(root / name))
        paths += images
        targets += [label] * len(images)
    if empty:
        more = f" (and {len(empty) - 3} more)" if len(empty) > 3 else ""
        raise DatasetError(
            f"class folder without images: {', '.join(empty[:3])}{more}. Add images or remove it. {_LAYOUT}"
        )
    return paths, targets, classes


def _images_below(folder: Path) -> list[str]:
    return find_images(folder).paths
