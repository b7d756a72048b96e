"""All images of a folder with one sub-folder per class, to be scored and not to be divided."""

from __future__ import annotations

import os
from pathlib import Path

from vimtune.data.base import FileDataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.images import EXTENSIONS, describe_left_out, find_images
from vimtune.data.own.label_tables import tables_in
from vimtune.data.own.layout import split_of
from vimtune.text import name_some, quote


class LabelledFolder(FileDataset):
    """Every image below `root/<class>/`. One class is enough, and a class may be without images."""

    def __init__(self, root: Path) -> None:
        """Look for the images.

        Raises:
            DatasetError: no folder, no class folder with images, or folders that hold splits.
            ImageReadError: a folder cannot be read.
        """
        shown = quote(str(root))
        if not root.is_dir():
            raise DatasetError(f"--folder {shown}: there is no such folder; expected {shown}/<class>/*.jpg")
        found = find_images(root)
        parts = [Path(os.path.relpath(path, root)).parts for path in found.paths]
        classes = sorted({path.name for path in map(Path, found.folders) if path.parent == root})
        inside = [(path, names[0]) for path, names in zip(found.paths, parts, strict=True) if len(names) > 1]
        loose = len(parts) - len(inside)
        left_out = describe_left_out(found.left_out, root) if found.left_out else ""
        if not inside:
            has = f"{loose} images beside no class folder" if loose else "no images"
            also = f"; left out: {left_out}" if left_out else ""
            if tables := tables_in(root):
                also += f", and {name_some(tables)}, which --dataset csv --data-dir {shown} reads"
            raise DatasetError(
                f"--folder {shown} has {has}{also}; expected {shown}/<class>/*.jpg. Image types: "
                f"{' '.join(EXTENSIONS)}"
            )
        splits = [name for name in classes if split_of(name)]
        if splits and all(len(names) > 2 for names in parts if names[0] in splits):
            raise DatasetError(
                f"--folder {shown} holds folders of splits ({name_some(splits)}): name one of them, such as "
                f"--folder {quote(str(root / splits[0]))}, or the data set with --data-dir"
            )
        numbers = {name: label for label, name in enumerate(classes)}
        filled = {name for _, name in inside}
        empty = [name for name in classes if name not in filled]
        notes = [f"no images of {name_some(empty)}"] if empty else []
        notes += [f"left out: {loose} images beside the class folders"] if loose else []
        notes += [f"left out: {left_out}"] if left_out else []
        paths, targets = [path for path, _ in inside], [numbers[name] for _, name in inside]
        self._set_files("folder", root, paths, targets, classes, f"folder {shown}", notes)
