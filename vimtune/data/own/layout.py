"""What the folders of a data set mean: which are splits, which are classes.

Two layouts are understood, and nothing is guessed beyond them:

- divided: `train/<class>/...`, with `val/` and `test/` of the same classes beside it; `split_of` says which
  names are those of a split;
- undivided: `<class>/...`.

A class folder may hold sub-folders. What could mean either is refused with what was found: such a mistake
causes no error later, but images of the test split that are trained on.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from vimtune.data.errors import DatasetError
from vimtune.data.files.images import EXTENSIONS, FoundImages, describe_left_out, find_images
from vimtune.text import counted, name_some, printable

LAYOUT = (
    "Expected <data-dir>/<class>/*.jpg (split for you), or <data-dir>/train/<class>/*.jpg with val/ and "
    f"test/ of the same classes beside it. Image types: {' '.join(EXTENSIONS)}."
)
"""Sentences that tell the user which folders are understood."""

_SPLIT_NAMES = {
    "train": "train|training|trn",
    "val": "val|valid|validation|dev|develop|development|eval|evaluation",
    "test": "test|tests|testing|tst|holdout",
}
"""Regular expressions of the names that people give to the folder of a split, in lower case."""
_FILLER = "(?:set|dataset|data|split|images?|imgs?|folder|samples|seg)*"
"""Words that may stand around such a name without a meaning of their own, as in `train_images`."""
_LOOK_INTO = 3
"""Levels of folders that are searched for the data when they do not begin at the folder given."""


@dataclass(frozen=True)
class Layout:
    """The images below a folder, by split and class.

    Attributes:
        classes: names of the class folders, sorted.
        parts: for each split that has a folder of its own, (path, label) of its images, sorted by class and
            path. An undivided folder has the one part "all".
        folders: split -> name of its folder.
        names: split -> what messages call the place of its images, such as "train/".
        tags: of images that may have several labels: path -> the labels. The label in `parts` is then the
            rarest of them, by which images are drawn, or -1 for an image without any.
        missing: what is said where a split is asked for that is not there, with "{split}" for its name and
            "{unused}" for notes on what is not used.
        notes: split (or "all") -> what is to be said about the part, such as files left out.
    """

    classes: list[str]
    parts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tags: dict[str, tuple[int, ...]] | None = None
    missing: str = f"no {{split}} folder{{unused}}. {LAYOUT}"
    notes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def split_of(name: str) -> str | None:
    """The split that a folder of this name holds by custom: "train", "val", "test", or None.

    Case, digits, punctuation and words such as "set" and "images" do not matter: Training, test_set, val2017.
    """
    letters = re.sub(r"[\W\d_]+", "", name.lower())
    for split, names in _SPLIT_NAMES.items():
        if re.fullmatch(f"{_FILLER}(?:{names}){_FILLER}", letters):
            return split
    return None


def read_layout(root: Path) -> Layout:
    """Look at everything below `root` and say what it means.

    Raises:
        DatasetError: no layout, an ambiguous one, or one that no classifier can be trained on (one class, a
            class without images, the same image in two classes or splits).
        ImageReadError: a folder cannot be read.
    """
    found = find_images(root)
    tree = _build_tree(root, found)
    if not found.paths:
        left_out = describe_left_out(found.left_out, root)
        raise DatasetError(
            f"{_show(root)} has no images{f'; left out: {left_out}' if left_out else ''}. {LAYOUT}"
        )
    try:
        layout = _understand(root, tree)
    except _NoLayoutError as error:
        raise DatasetError(f"{error} {_advice(root, tree) or LAYOUT}") from None
    _refuse_shared(root, layout, found)
    _add_left_out(root, layout, found, tree)
    return layout


class _NoLayoutError(DatasetError):
    """A folder that is not what it was taken for; the data may begin further below."""


# --------------------------------------------------------------------------- the folders as a tree


@dataclass
class _Folder:
    parent: _Folder | None = None
    folders: dict[str, _Folder] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    """Paths of the images directly inside, sorted."""
    below: list[str] = field(default_factory=list)
    """Paths of all images inside at any depth, sorted."""

    def filled(self) -> list[str]:
        """Names of the sub-folders with images at any depth, sorted."""
        return sorted(name for name, folder in self.folders.items() if folder.below)

    def labelled(self, classes: list[str]) -> list[tuple[str, int]]:
        """(path, label) of the images in the sub-folders `classes`."""
        found = ((self.folders[name], label) for label, name in enumerate(classes) if name in self.folders)
        return [(path, label) for folder, label in found for path in folder.below]


def _build_tree(root: Path, found: FoundImages) -> _Folder:
    folders = {os.fspath(root): _Folder()}
    for path in found.folders:  # In sorted order parents come first.
        parent, name = os.path.split(path)
        folders[path] = folders[parent].folders[name] = _Folder(folders[parent])
    for path in found.paths:
        folder: _Folder | None = folders[os.path.dirname(path)]
        assert folder is not None, "images lie in folders that were read"
        folder.images.append(path)
        while folder is not None:
            folder.below.append(path)
            folder = folder.parent
    return folders[os.fspath(root)]


# --------------------------------------------------------------------------- layouts


def _understand(root: Path, tree: _Folder) -> Layout:
    folders = _split_folders(root, tree)
    return _read_divided(root, tree, folders) if folders else _read_undivided(root, tree)


def _split_folders(root: Path, tree: _Folder) -> dict[str, str]:
    """Split -> folder name; empty for an undivided folder.

    A folder named like a split is one if it holds class folders. So a class may be called "train".
    """
    named = {name: split for name in tree.filled() if (split := split_of(name))}
    others = [name for name in tree.filled() if name not in named]
    if any(tree.folders[name].filled() for name in named):
        if others:
            raise _NoLayoutError(
                f"{_show(root)} holds folders of splits ({name_some(named)}) beside other folders with "
                f"images ({name_some(others)}). Move away what does not belong to the data."
            )
        return _one_folder_each(root, named)
    if set(named.values()) <= {"train"}:
        return {}
    if others:
        raise _NoLayoutError(
            f"{_show(root)} holds {name_some(named)} beside {name_some(others)}: splits, or classes of "
            f"that name? Move or rename them."
        )
    raise _NoLayoutError(
        f"{_show(root)} holds {name_some(named)} with images but no class folders, so there are no labels."
    )


def _one_folder_each(root: Path, named: dict[str, str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for name, split in named.items():
        if split in folders:
            both = name_some([folders[split], name])
            raise DatasetError(
                f"{_show(root)} has two folders for the {split} split: {both}. Keep one of them there."
            )
        folders[split] = name
    return folders


def _read_divided(root: Path, tree: _Folder, folders: dict[str, str]) -> Layout:
    if "train" not in folders:
        raise _NoLayoutError(f"{_show(root)} has {name_some(folders.values())} but no train folder.")
    train = root / folders["train"]
    layout = Layout(_classes(train, tree.folders[folders["train"]]))
    for split, name in folders.items():
        folder = tree.folders[name]
        if not folder.filled():  # Competitions publish such test images without labels.
            layout.notes["train"].append(
                f"not used: {counted(len(folder.below), 'images')} in {printable(name)}/, which has no class "
                "folders"
            )
            continue
        if extra := sorted(set(folder.filled()) - set(layout.classes)):
            missing = sorted(set(layout.classes) - set(folder.filled()))
            raise DatasetError(
                f"{_show(root / name)} must have the classes of {_show(train)}: missing "
                f"{name_some(missing) or 'none'}, extra {name_some(extra)}."
            )
        layout.folders[split], layout.names[split] = name, f"{printable(name)}/"
        layout.parts[split] = folder.labelled(layout.classes)
    return layout


def _read_undivided(root: Path, tree: _Folder) -> Layout:
    classes = _classes(root, tree)
    return Layout(classes, parts={"all": tree.labelled(classes)})


def _classes(folder: Path, tree: _Folder) -> list[str]:
    """Names of the class folders in `folder`; refuses what cannot be classes."""
    filled = tree.filled()
    if not filled:
        raise _NoLayoutError(f"{_show(folder)} has no class folders.")
    for name in filled:
        inner = tree.folders[name].filled()
        if any(split_of(part) in ("val", "test") for part in inner):
            raise _NoLayoutError(
                f"{_show(folder / name)} holds folders of splits ({name_some(inner)}), so it is no class."
            )
    empty = sorted(set(tree.folders) - set(filled))
    if len(filled) == 1:
        also = f" (none in {name_some(empty)})" if empty else ""
        raise _NoLayoutError(
            f"{_show(folder)} has only one folder with images, {name_some(filled)}{also}; a classifier needs "
            f"at least 2 classes."
        )
    if empty:
        shown = name_some(str(folder / name) for name in empty)
        raise _NoLayoutError(f"class folder without images: {shown}. Add images or remove it.")
    return filled


def _advice(folder: Path, tree: _Folder) -> str:
    """Names the folder further below that looks like the data, if there is one."""
    level = {folder: tree}
    for _ in range(_LOOK_INTO):
        # What is inside a split folder is a part of the data only.
        level = {
            path / name: inner
            for path, outer in level.items()
            for name, inner in outer.folders.items()
            if split_of(name) is None or any(map(split_of, inner.filled()))
        }
        for path, inner in sorted(level.items(), key=lambda item: item[0]):
            if _is_understood(path, inner):
                return f"Did you mean --data-dir {shlex.quote(_show(path))}?"
    return ""


def _is_understood(path: Path, tree: _Folder) -> bool:
    try:
        _understand(path, tree)
    except DatasetError:
        return False
    return True


# --------------------------------------------------------------------------- links and words


def _refuse_shared(root: Path, layout: Layout, found: FoundImages) -> None:
    """Refuse links by which images would belong to two classes or splits."""
    depth = 2 if layout.folders else 1  # So many folders around an image say what it is.
    folders = set(found.folders)
    for link, first in found.links.items():
        one, two = (Path(os.path.relpath(path, root)).parts for path in (link, first))
        labelled = first in folders or min(len(one), len(two)) > depth
        if labelled and one[:depth] != two[:depth]:
            raise DatasetError(
                f"{_show(link)} links to {_show(first)}: the same images cannot belong to two classes or "
                f"splits. Remove the link."
            )


def _add_left_out(root: Path, layout: Layout, found: FoundImages, tree: _Folder) -> None:
    """Note with each part what was left out of it; what lies outside of all parts, with the first."""
    loose = list(tree.images)
    for name in layout.folders.values():
        loose += tree.folders[name].images
    left_out = {**found.left_out, **({"beside the class folders": sorted(loose)} if loose else {})}
    places = {os.path.join(root, name, ""): split for split, name in layout.folders.items()}
    by_part: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for reason, paths in left_out.items():
        for path in paths:
            part = next((split for place, split in places.items() if path.startswith(place)), None)
            by_part[part or ("train" if places else "all")].setdefault(reason, []).append(path)
    for part, kept in by_part.items():
        layout.notes[part].append(f"left out: {describe_left_out(kept, root)}")


def _show(path: str | os.PathLike[str]) -> str:
    return printable(os.fspath(path))
