"""How the names of files with weights end: the one place for whatever knows such a file by its name.

All endings are in lower case; a name is compared in lower case, too, because some systems write it otherwise.
"""

from __future__ import annotations

SAFETENSORS = ".safetensors"
"""Tensors by their names, and texts about them."""
OF_TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""What is written with `torch.save`; ".tar" is the end of ".pth.tar"."""
PLAIN_WEIGHTS = (SAFETENSORS, *OF_TORCH)
"""Weights without the model that computes with them."""
ONNX = ".onnx"
"""A model with its weights as a graph, for onnxruntime and its like."""
PT2 = ".pt2"
"""The same, of `torch.export`."""
WEIGHTS = (*PLAIN_WEIGHTS, ONNX, PT2)
"""Whatever has weights in it."""
