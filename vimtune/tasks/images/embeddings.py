"""Features of images as vectors: kept in a file, and searched for what is alike. N images, D width."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vimtune.output import write_bytes
from vimtune.text import csv_text, printable, quote, shorten

AT_ONCE = 2**24
"""Similarities that are computed together: those of many images need no more memory than those of few."""
_ITSELF = 0.9999
"""Least cosine of an image with itself, whatever was computed beside it."""


class EmbeddingsError(ValueError):
    """A file that holds no embeddings, or those of another model."""


@dataclass(frozen=True)
class Embeddings:
    """Images as vectors that a model has made of them."""

    names: list[str]
    """Path of each image, or its place among the inputs."""
    vectors: np.ndarray
    """Float32 (N, D): the features before the head."""
    digest: str
    """Hash of what the weights of the model come from."""

    def __len__(self) -> int:
        return len(self.names)

    def nearest(self, queries: Embeddings, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar of these images to each query, most similar first; fewer if there are no more.

        An image is not its own neighbour: one of the same name and the same features is passed over.

        Args:
            queries: Q images by the same model.
            k: how many are wanted.

        Returns:
            int64 (Q, k), indices, and float32 (Q, k), cosines of the vectors, from -1 to 1. Where fewer are
            left, the index is -1 and the cosine is not a number.

        Raises:
            EmbeddingsError: another model has made the queries.
        """
        if queries.digest != self.digest or queries.vectors.shape[1] != self.vectors.shape[1]:
            raise EmbeddingsError(
                "these embeddings were made by another model than those they are compared with: make both "
                "with the same adapter"
            )
        own, asked = _unit(self.vectors), _unit(queries.vectors)
        names = np.array(self.names, dtype=object)
        k = min(k, len(self))
        indices = np.full((len(queries), k), -1, np.int64)
        cosines = np.full((len(queries), k), np.nan, np.float32)
        step = max(1, AT_ONCE // max(1, len(self)))
        for start in range(0, len(queries), step):
            similar = asked[start : start + step] @ own.T
            for row, name in enumerate(queries.names[start : start + step]):
                similar[row, (names == name) & (similar[row] > _ITSELF)] = -np.inf
            order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
            found = np.take_along_axis(similar, order, axis=1)
            there = np.isfinite(found)
            indices[start : start + step] = np.where(there, order, -1)
            cosines[start : start + step] = np.where(there, found, np.nan)
        return indices, cosines

    def save(self, path: Path) -> None:
        """Write them in the format that the name of the file asks for, one of `FORMATS`.

        Raises:
            OutputError: the disk is full, or the like; an earlier file is then as it was.
        """
        write_bytes(path, FORMATS[path.suffix.lower()](self))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) of length 1; zeros stay what they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def to_npz(embeddings: Embeddings) -> bytes:
    """An archive of numpy with the arrays "vectors", float32 (N, D), "paths", bytes (N,), and "digest", the
    text of `Embeddings.digest`.

    No other format is read back.
    """
    file = io.BytesIO()
    # Names are bytes, because a path need not be Unicode.
    names = [os.fsencode(name) for name in embeddings.names]
    paths = np.array(names) if names else np.zeros(0, "S1")
    np.savez(file, vectors=embeddings.vectors, paths=paths, digest=np.array(embeddings.digest))
    return file.getvalue()


def to_csv(embeddings: Embeddings) -> bytes:
    """A row for each image: its path, then the numbers of its vector."""
    header = ["path", *(f"x{number}" for number in range(embeddings.vectors.shape[1]))]
    rows = (
        [name, *(float(f"{value:.6g}") for value in vector.tolist())]
        for name, vector in zip(embeddings.names, embeddings.vectors, strict=True)
    )
    return csv_text([header, *rows]).encode("utf-8", "backslashreplace")


FORMATS: dict[str, Callable[[Embeddings], bytes]] = {".npz": to_npz, ".csv": to_csv}
"""How a file is written whose name ends so."""


def read_embeddings(path: Path) -> Embeddings:
    """Read what `to_npz` has written. A file may come from anybody: nothing in it is unpacked or run.

    Raises:
        EmbeddingsError: no such file, or another kind of file.
    """
    shown = quote(str(path))
    if not path.is_file():
        raise EmbeddingsError(
            f"{shown} is no file; expected embeddings that vimtune embed has written (.npz)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
        with np.load(path, allow_pickle=False) as arrays:
            vectors, paths, digest = (arrays[name] for name in ("vectors", "paths", "digest"))
    # These are what zipfile and numpy raise for other and damaged files.
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as error:
        reason = shorten(printable(str(error)) or type(error).__name__)
        raise EmbeddingsError(
            f"{shown} holds no embeddings ({reason}); expected a file that vimtune embed has written (.npz)"
        ) from error
    if (
        vectors.dtype != np.float32
        or vectors.ndim != 2
        or paths.dtype.kind != "S"
        or paths.shape != vectors.shape[:1]
        or digest.dtype.kind != "U"
        or digest.shape != ()
        or not np.isfinite(vectors).all()
    ):
        raise EmbeddingsError(f"{shown} holds no embeddings; expected a file that vimtune embed has written")
    return Embeddings([os.fsdecode(name) for name in _bytes(paths)], vectors, str(digest))


def _bytes(paths: np.ndarray) -> Sequence[bytes]:
    names: list[bytes] = paths.tolist()
    return names
