"""torch.export's format: a graph of torch's operations, which torch runs without this package."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from vimtune.export.formats import About, ExportFormat
from vimtune.export.graph import trace
from vimtune.export.scans import chunked_recurrence


class Pt2Format(ExportFormat):
    """Files `.pt2` of `torch.export.save`; what they say about the model are extra files inside."""

    def write(self, model: nn.Module, image: Sequence[int], about: About, path: Path) -> None:
        """Trace the model and save the graph; see `ExportFormat.write`."""
        program = trace(model, image, chunked_recurrence)
        saved = io.BytesIO()
        torch.export.save(program, saved, extra_files=about.metadata())
        with path.open("wb") as file:
            _compress_texts(saved, file)

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """The module of the graph; see `ExportFormat.open`."""
        with path.open("rb") as file:
            module = torch.export.load(file).module()

        def run(images: Tensor) -> Tensor:
            """The logits of a batch."""
            with torch.no_grad():
                logits: Tensor = module(images)
            return logits

        return run


def _compress_texts(saved: IO[bytes], file: IO[bytes]) -> None:
    """Copy the archive of a graph with its texts compressed.

    torch stores them as they are, and reads them either way. The description of the graph is half as large
    as the weights of a small model, and a twentieth of that when it is compressed. Weights stay as they are:
    they hardly get smaller. The times of the entries, which are the same in all that torch writes, stay
    as well, so that a model that is exported again has the same file.
    """
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(file, "w") as copy:
        for entry in archive.infolist():
            is_text = entry.filename.endswith(".json")
            kind = zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED
            own = zipfile.ZipInfo(entry.filename, entry.date_time)
            copy.writestr(own, archive.read(entry), compress_type=kind)
