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
    differing_options,
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
from vimtune.methods import a_tuning, d_tuning, bias_tuning, conv1d_tuning  # noqa: F401  # isort: skip
from vimtune.methods import cls_token_tuning, pos_embed_tuning, ssm, parallel_adapter  # noqa: F401  # isort: skip
from vimtune.methods import prompt, affix, additional_scan, state_offset, svp, memba  # noqa: F401  # isort: skip
from vimtune.methods import sdt, oft, c3a, cdvft, ia3  # noqa: F401  # isort: skip

__all__ = [
    "METHODS",
    "ChosenMethod",
    "Method",
    "build_methods",
    "differing_options",
    "get_method",
    "list_methods",
    "method_names",
    "option",
    "register_method",
    "resolve_options",
    "sizing_options",
    "split_options",
]
