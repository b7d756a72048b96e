"""ONNX: a graph of standard operators, which onnxruntime and other programs run without torch.

The recurrence is one function of the file, written here in ONNX's own text, with the operator Scan inside;
every scan of the model is a call of it.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vimtune.export.formats import INPUT, OUTPUT, About, ExportFormat
from vimtune.export.graph import trace

if TYPE_CHECKING:
    import onnx

DOMAIN, FUNCTION, VERSION = "vimtune", "SelectiveScan", 1
"""By what the graph calls the function of the recurrence."""

# A `Recurrence` of `vimtune.export.scans`. The directions say for each sequence whether Scan begins at its
# end. In the body one token's rows meet all states at once: (batch, 1, width) with (states, width).
SELECTIVE_SCAN = """
<opset_import: ["" : {opset}], domain: "{domain}">
{function} <directions_in, directions_out> (state, dt, x, A, B, C) => (y, last)
{{
    rows = Constant <value_ints = [2]> ()
    columns = Constant <value_ints = [3]> ()
    dt_first = Transpose <perm = [1, 0, 2]> (dt)
    x_first = Transpose <perm = [1, 0, 2]> (x)
    B_first = Transpose <perm = [1, 0, 2]> (B)
    C_first = Transpose <perm = [1, 0, 2]> (C)
    dt_rows = Unsqueeze (dt_first, rows)
    x_rows = Unsqueeze (x_first, rows)
    B_columns = Unsqueeze (B_first, columns)
    C_rows = Unsqueeze (C_first, rows)
    last, y_rows = Scan <
        num_scan_inputs = 4,
        scan_input_directions: ints = @directions_in,
        scan_output_directions: ints = @directions_out,
        body = token (
            float[batch, states, width] before,
            float[batch, 1, width] dt_row,
            float[batch, 1, width] x_row,
            float[batch, states, 1] B_column,
            float[batch, 1, states] C_row
        ) => (float[batch, states, width] after, float[batch, 1, width] y_row) {{
            exponent = Mul (dt_row, A)
            decay = Exp (exponent)
            kept = Mul (decay, before)
            added = Mul (x_row, B_column)
            after = Add (kept, added)
            y_row = MatMul (C_row, after)
        }}
    > (state, dt_rows, x_rows, B_columns, C_rows)
    y_first = Squeeze (y_rows, rows)
    y = Transpose <perm = [1, 0, 2]> (y_first)
}}
"""
"""The function in ONNX's text; `opset` is the version of the standard operators."""


def onnx_recurrence(
    state: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """A `Recurrence` that is a call of the function above; it can only be traced."""
    direction = int(reverse)
    y, last = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{FUNCTION}",
        (state, dt, x, A, B, C),
        {"directions_in": [direction] * 4, "directions_out": [direction]},
        dtypes=(x.dtype, state.dtype),
        shapes=(x.shape, state.shape),
        version=VERSION,
    )
    return y, last


class OnnxFormat(ExportFormat):
    """Files `.onnx`; what they say about the model is their metadata."""

    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, model: nn.Module, image: Sequence[int], about: About, path: Path) -> None:
        """Trace the model and let torch write it in ONNX's operators; see `ExportFormat.write`."""
        import onnx

        program = trace(model, image, onnx_recurrence)
        # To convert an operation of mixed dtypes torch runs it once more and takes the first call it sees for
        # the operation. With autograd on, torch 2.11 sees what that does first where a parameter is involved.
        # Warnings concern names that torch gives and takes itself; older versions of onnxscript print, too.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            converted: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        proto: onnx.ModelProto = converted.model_proto
        _add_function(proto)
        _tidy(proto)
        onnx.helper.set_model_props(proto, about.metadata())
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString())

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """A session of onnxruntime; see `ExportFormat.open`."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            """The logits of a batch."""
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

        return run


def _add_function(proto: onnx.ModelProto) -> None:
    """Give a model the function that its scans call, in the version of the operators that it has."""
    import onnx

    opset = next(each.version for each in proto.opset_import if not each.domain)
    text = SELECTIVE_SCAN.format(opset=opset, domain=DOMAIN, function=FUNCTION)
    proto.functions.append(onnx.parser.parse_function(text))
    used = {each.domain: each.version for each in proto.opset_import} | {DOMAIN: VERSION}
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(*each) for each in used.items())


def _tidy(proto: onnx.ModelProto) -> None:
    """Name what goes in and out, and remove what torch notes about its own sources, paths among it."""
    graph = proto.graph
    for value, name in ((graph.input[0], INPUT), (graph.output[0], OUTPUT)):
        old = value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [name if each == old else each for each in names]
        value.name = name
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]
    del proto.metadata_props[:]
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
