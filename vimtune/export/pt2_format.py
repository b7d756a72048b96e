"""torch.export's format: a graph of torch's operations, which torch runs without this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
        with path.open("wb") as file:  # Of a name torch would demand that it ends in .pt2.
            torch.export.save(program, file, extra_files=about.metadata())

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
