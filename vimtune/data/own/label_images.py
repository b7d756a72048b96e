"""The images below a folder, as the rows of tables of labels name them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath

from vimtune.data.errors import DatasetError
from vimtune.data.files.images import find_images
from vimtune.text import printable, quote


class TableImages:
    """The images below a folder, and which of them rows have named."""

    def __init__(self, base: Path) -> None:
        """Look for the images.

        Raises:
            ImageReadError: a folder cannot be read.
        """
        self._base = base
        self._found = find_images(base).paths
        names = [PurePosixPath(os.path.relpath(path, base).replace(os.sep, "/")) for path in self._found]
        self._by_name = {str(name): path for name, path in zip(names, self._found, strict=True)}
        stems = Counter(str(name.with_suffix("")) for name in names)
        self._by_stem = {
            stem: path
            for name, path in zip(names, self._found, strict=True)
            if stems[stem := str(name.with_suffix(""))] == 1
        }
        self._named: set[str] = set()
        self._missing: list[tuple[str, str]] = []

    def find(self, text: str, place: str) -> str:
        """The image that a row at `place` names by `text`; `demand_all` reports one that is not there.

        Raises:
            DatasetError: it is no path below the folder.
        """
        path = Path(text.replace("\\", "/"))
        if path.is_absolute() and path.is_relative_to(self._base.absolute()):
            path = path.relative_to(self._base.absolute())
        if path.is_absolute() or ".." in path.parts or "\0" in text or not path.name:
            raise DatasetError(
                f"{place}: {quote(text)} is no path of an image below {printable(str(self._base))}"
            )
        found = self._known(path.as_posix())
        if found is None:
            found = str(self._base / path)
            if not os.path.isfile(found):
                self._missing.append((place, text))
        self._named.add(found)
        return found

    def pass_over(self, text: str) -> None:
        """Note that a row names an image that is not used, whether it is there or not."""
        found = self._known(text.replace("\\", "/"))
        if found is not None:
            self._named.add(found)

    def _known(self, name: str) -> str | None:
        """The image of this name, which may lack its ending."""
        return self._by_name.get(name) or self._by_stem.get(name)

    def demand_all(self) -> None:
        """Raise DatasetError if images that rows name are not there."""
        if self._missing:
            place, text = self._missing[0]
            count = f"{len(self._missing)} of {len(self._named)} images"
            raise DatasetError(
                f"{count} are not in {printable(str(self._base))}, such as {quote(text)} ({place}). "
                "Paths start at that folder; name another one below the data by images=..."
            )

    def unused(self) -> list[str]:
        """The images that no row has named."""
        return [path for path in self._found if path not in self._named]
