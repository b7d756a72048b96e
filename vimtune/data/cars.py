"""Stanford Cars (Krause et al., 2013). Its download is gone, so the files are placed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Lt

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import check_files_exist, plain_name, whole_numbers
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE, locate_root
from vimtune.data.splitting import stratified_split

_TEST_LABELS = "cars_test_annos_withlabels.mat"
"""The file with the labels of the test images, which the devkit itself lacks."""
_HELP = (
    "The owner's download no longer exists; take a mirror (e.g. on Kaggle or the Hugging Face hub) and place "
    "it by hand as <data-dir>/stanford_cars/ with cars_train/00001.jpg ... (8144 images), "
    "cars_test/00001.jpg ... (8041 images), devkit/cars_meta.mat, devkit/cars_train_annos.mat and "
    f"{_TEST_LABELS} (there or in devkit/)."
)
"""The sentences that tell a user how to get the files and where they are expected."""


@register_dataset("cars")
class Cars(FileDataset):
    """196 car models: 8144 official training and 8041 test images.

    There is no official validation part: "val" is a stratified `val_fraction` of the training images drawn
    with `seed`, "train" the others, "train+val" all 8144.
    """

    summary = "Stanford Cars, official split (196 classes; files placed by hand)"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1,
    ) -> None:
        del img_size, download
        root, found = locate_root(data_dir, ["stanford_cars", "cars"], "devkit/cars_meta.mat")
        if not found:
            raise DatasetError(f"Stanford Cars is not in {root}. {_HELP} {EMBEDDED_ALTERNATIVE}")
        official = "test" if split == "test" else "train"
        table = _test_table(root) if split == "test" else root / "devkit" / "cars_train_annos.mat"
        classes = _load(root / "devkit" / "cars_meta.mat", "class_names")
        if not all(isinstance(name, str) for name in classes):
            raise DatasetError(f"the class names in {root} are damaged. {_HELP}")
        rows = _read_rows(table, len(classes))
        if split in ("train", "val"):
            val, train = stratified_split([label for _, label in rows], [val_fraction], seed)
            rows = [rows[i] for i in (val if split == "val" else train)]
        paths = [str(root / f"cars_{official}" / name) for name, _ in rows]
        check_files_exist(paths, f"Stanford Cars in {root}", _HELP)
        drawn = (
            f" (val: {val_fraction:.0%} of the official train, seed {seed})"
            if split in ("train", "val")
            else ""
        )
        source = f"Stanford Cars {split} part{drawn} from {root}"
        self._set_files(split, root, paths, [label for _, label in rows], classes, source)


def _test_table(root: Path) -> Path:
    for candidate in (root / _TEST_LABELS, root / "devkit" / _TEST_LABELS):
        if candidate.exists():
            return candidate
    raise DatasetError(
        f"Stanford Cars in {root} has no {_TEST_LABELS}: the test images have no labels. {_HELP}"
    )


def _read_rows(table: Path, num_classes: int) -> list[tuple[str, int]]:
    """File name and label (0-based) of every image."""
    import numpy as np  # This comes late, because data sets are listed without numpy.

    rows = _load(table, "annotations")
    if not all(isinstance(row, dict) and {"fname", "class"} <= row.keys() for row in rows):
        raise DatasetError(f"{table} is damaged (its annotations lack fname or class). {_HELP}")
    numbers = [number for row in rows for number in np.ravel(row["class"])]
    labels = whole_numbers(numbers, 1, num_classes, f"the classes in {table}")
    if len(labels) != len(rows):
        raise DatasetError(f"{table} is damaged (an image has no class, or several). {_HELP}")
    names = [plain_name(row["fname"], str(table)) for row in rows]
    if len(set(names)) < len(names):
        raise DatasetError(f"{table} is damaged (it names an image twice). {_HELP}")
    return [(name, label - 1) for name, label in zip(names, labels, strict=True)]


def _load(path: Path, key: str) -> list[Any]:
    # This comes late, because data sets are listed without numpy.
    from vimtune.data.files.mat import read_mat

    try:
        values = read_mat(path, [key])[key]
    except DatasetError as error:
        raise DatasetError(f"Stanford Cars is incomplete: {error} {_HELP}") from error
    if not isinstance(values, list) or not values:
        raise DatasetError(f"{path} is damaged ({key} is no list). {_HELP}")
    return values
