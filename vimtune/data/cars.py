"""Stanford Cars (Krause et al., 2013). Its download is gone, so the files are placed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Lt

from vimtune.data.base import (
    EMBEDDED_ALTERNATIVE,
    FileDataset,
    check_files_exist,
    locate_root,
    register_dataset,
    stratified_split,
)
from vimtune.data.errors import DatasetError

_TEST_LABELS = "cars_test_annos_withlabels.mat"
_HELP = (
    "The owner's download no longer exists; take a mirror (e.g. on Kaggle or the Hugging Face hub) and place "
    "it by hand as <data-dir>/stanford_cars/ with cars_train/00001.jpg ... (8144 images), "
    "cars_test/00001.jpg ... (8041 images), devkit/cars_meta.mat, devkit/cars_train_annos.mat and "
    f"{_TEST_LABELS} (there or in devkit/)."
)


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
        classes = [str(name) for name in _load(root / "devkit" / "cars_meta.mat", "class_names")]
        official = "test" if split == "test" else "train"
        table = _test_table(root) if split == "test" else root / "devkit" / "cars_train_annos.mat"
        rows = [(str(row["fname"]), int(row["class"]) - 1) for row in _load(table, "annotations")]
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


def _load(path: Path, key: str) -> list:
    from scipy.io import loadmat

    try:
        return list(loadmat(path, squeeze_me=True)[key])
    except FileNotFoundError as error:
        raise DatasetError(f"Stanford Cars is incomplete: {path} is missing. {_HELP}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error}). {_HELP}") from error
