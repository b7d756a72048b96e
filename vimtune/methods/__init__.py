"""The methods by which a model is adapted: options and places, one file each. Nothing here imports torch.

A new method is a new file beside these (`lora.py` is the pattern) and its name in the import below; its
formula is in `vimtune.adapters.rules` unless an existing one serves.
"""

# The modules are imported in the order in which `--list` shows their methods.
from vimtune.methods.base import (  # isort: skip
    METHODS,
    ChosenMethod,
    Method,
    build_methods,
    get_method,
    list_methods,
    method_names,
    option,
    register_method,
    resolve_options,
    sizing_options,
    split_options,
)
from vimtune.methods import prodial, lora, dora, bitfit, linear, full, ft, strong  # noqa: F401  # isort: skip

__all__ = [
    "METHODS",
    "ChosenMethod",
    "Method",
    "build_methods",
    "get_method",
    "list_methods",
    "method_names",
    "option",
    "register_method",
    "resolve_options",
    "sizing_options",
    "split_options",
]
