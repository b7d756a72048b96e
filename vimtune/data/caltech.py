"""Caltech-101 (Fei-Fei et al., 2004) with the split that `vimtune.data.caltech_split` fixes."""

from __future__ import annotations

from pathlib import Path

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import check_files_exist
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE, locate_root

_FOLDER = "101_ObjectCategories"
"""The folder of the archive that holds the categories."""
_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
"""Where the data set is downloaded from."""
_MD5 = "3138e1922a9193bfa496528edbbc45d0"
"""Checksum of the downloaded file, which may not be another one than its authors published."""
_LAYOUT = (
    f"Expected <data-dir>/caltech101/{_FOLDER}/<category>/image_0001.jpg ... for 102 categories "
    f"({_FOLDER}.tar.gz inside {_URL})."
)
"""The sentence that tells a user where the files are expected."""


@register_dataset("caltech")
class Caltech(FileDataset):
    """102 categories: 2550 train, 510 val, 6084 test images; 3060 in train+val."""

    summary = "Caltech-101, 30 images per class for training (102 classes; downloads 137 MB)"

    def __init__(
        self, split: str, data_dir: Path | None, *, seed: int, img_size: tuple[int, int], download: bool
    ) -> None:
        # Imported late, because data sets are listed without the schemas of files.
        from vimtune.data.caltech_split import SPLIT_SEED, load_split, select_numbers

        del seed, img_size  # The split is fixed, and the images have sizes of their own.
        root, found = locate_root(data_dir, ["caltech101", "caltech-101"], _FOLDER)
        if not found and root.name == _FOLDER and root.is_dir():
            root = root.parent
        elif not found:
            if not download:
                raise DatasetError(f"Caltech-101 is not in {root}. {_LAYOUT} {EMBEDDED_ALTERNATIVE}")
            _download(root)
        paths, targets = [], []
        categories = load_split().categories
        for label, (category, entry) in enumerate(categories.items()):
            for number in select_numbers(entry, split):
                paths.append(str(root / _FOLDER / category / f"image_{number:04d}.jpg"))
                targets.append(label)
        check_files_exist(paths, f"Caltech-101 in {root}", _LAYOUT)
        names = [readable_name(category) for category in categories]
        source = f"Caltech-101 {split} part of vimtune's split (30 per class, seed {SPLIT_SEED}) from {root}"
        self._set_files(split, root, paths, targets, names, source)


def readable_name(category: str) -> str:
    """`water_lilly` -> `water lily`, `BACKGROUND_Google` -> `background (Google)`."""
    special = {"BACKGROUND_Google": "background (Google)", "water_lilly": "water lily"}
    return special.get(category, category.replace("_", " ").lower())


def _download(root: Path) -> None:
    from vimtune.data.files.archives import extract_archive
    from vimtune.download import DownloadError, download_file, download_lock

    try:
        with download_lock(root):
            if (root / _FOLDER).is_dir():
                return
            bundle = download_file(_URL, root / "caltech-101.zip", _MD5)
            archive = extract_archive(bundle, root, f"{_FOLDER}.tar.gz")
            extract_archive(archive, root, _FOLDER)
            archive.unlink()
            bundle.unlink()
    except DownloadError as error:
        raise DatasetError(
            f"Caltech-101 is not in {root} and: {error} {_LAYOUT} {EMBEDDED_ALTERNATIVE}"
        ) from error
