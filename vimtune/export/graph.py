"""A model as a graph of torch's own operations, for batches of any size.

Shape letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from vimtune.export.scans import Recurrence, operations
from vimtune.ops import use_backend

BACKEND = "torch"
"""The backend under which a model is traced: it composes every mixer of the same few operations, whatever
this machine has kernels for."""

ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What torch notes at each node about where it comes from: as much as the graph itself, with files of this
computer by name."""


def trace(model: nn.Module, image: Sequence[int], recurrence: Recurrence) -> ExportedProgram:
    """The graph of a model, which takes images (B, C, H, W) for any B.

    Args:
        model: in evaluation mode, on the CPU.
        image: (C, H, W).
        recurrence: the form in which the graph has the scans.
    """
    for module in model.modules():
        if hasattr(module, "backend"):  # The options of a model may name another one.
            module.backend = BACKEND  # type: ignore[assignment]
    with torch.no_grad(), use_backend(BACKEND):
        traced = torch.export.export(
            model, (torch.zeros(2, *image),), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
        program: ExportedProgram = traced.run_decompositions(operations(recurrence))
    program.example_inputs = None  # They would be written, too.
    for node in program.graph.nodes:
        for name in ORIGINS:
            node.meta.pop(name, None)
    return program
