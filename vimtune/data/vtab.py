"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): 19 tasks, each with 1000 images to learn from."""

from __future__ import annotations

from pathlib import Path

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE, locate_root
from vimtune.text import printable, quote, suggest

TASKS = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""The tasks by the names of their folders, in the order of the published tables: natural, specialised and
structured images; and how many classes each has."""

_LAYOUT = (
    "Expected <data-dir>/vtab-1k/<task>/ with the lists train800.txt, val200.txt, train800val200.txt and "
    "test.txt, whose lines are `images/name.jpg label`, and the images that they name."
)
"""The sentence that tells a user where the files are expected."""


@register_dataset("vtab")
class VTAB(FileDataset):
    """One task of VTAB-1k: 800 train, 200 val, 1000 train+val images, and the test images of its origin.

    - task: the name of the folder, such as cifar.

    The splits are those of the lists in the folder. A folder of a user's own in this form is a task, too.
    """

    summary = "VTAB-1k in its usual folders (train800.txt, ...): --dataset-kwargs task=cifar, 19 tasks"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        task: str = "cifar",
    ) -> None:
        del seed, img_size, download  # The split is fixed, and nobody offers a download.
        # This comes late, because data sets are listed without it.
        from vimtune.data.files.image_lists import read_lists

        root = _find(data_dir, task)
        lists = read_lists(root, TASKS.get(root.name))
        images = lists.images(split)
        classes = [f"class {label}" for label in range(lists.num_classes)]
        source = f"VTAB-1k {root.name}, {split} split of {lists.names(split)} in {printable(str(root))}"
        paths = [str(root / image.path) for image in images]
        self._set_files(split, root, paths, [image.label for image in images], classes, source)


def _find(data_dir: Path | None, task: str) -> Path:
    """The folder with the lists of a task, which may be `data_dir` itself.

    Raises:
        DatasetError: there is none.
    """
    from vimtune.data.files.image_lists import FILES

    if "/" in task or "\\" in task or task in ("", ".", ".."):
        raise DatasetError(f"data set 'vtab': task={quote(task)} is no name of a folder.")
    for name in FILES.values():
        root, found = locate_root(data_dir, [f"vtab-1k/{task}", task], name)
        if found:
            return root
    hint = "" if task in TASKS else f" No task of VTAB-1k has this name.{suggest(task, TASKS)}"
    raise DatasetError(
        f"task {quote(task)} of VTAB-1k is not in {printable(str(root))}.{hint} {_LAYOUT} "
        f"{EMBEDDED_ALTERNATIVE}"
    )
