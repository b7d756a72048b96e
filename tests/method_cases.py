"""Every registered method and thirty compositions, with options for models small enough for tests."""

from __future__ import annotations

from vimtune.fields import options_of
from vimtune.methods import get_method, list_methods
from vimtune.testing.methods import disturb

__all__ = ["CASES", "COMPILED", "COMPILED_WITHIN", "COMPOSITIONS", "SMALL", "disturb", "label", "options_for"]

# Options small enough for test_vim, whose narrowest target is 16 wide.
SMALL = {
    "rank": 3,
    "block_size": 4,
    "num_tokens": 3,
    "num_states": 2,
    "width": 3,
    "selection_steps": 2,
}
CASES = [
    *((name, {}) for name in list_methods()),
    ("prodial", {"variant": "paper"}),
    ("prodial", {"variant": "tanh", "train_scale": False, "lr_scale": 0.5}),
    ("prodial", {"block_size": 1}),
    ("lora+bitfit", {}),
    ("full+lora", {}),
    ("lora+dora", {"dora": {"dropout": 0.5}}),
    ("lora", {"dropout": 0.5}),
    ("dora", {"dropout": 0.5}),
    ("prodial", {"dropout": 0.5}),
    ("additional_scan+lora+affix+prompt", {}),
    ("lora", {"start": "pissa", "scaling": "rslora"}),
    ("dora", {"axis": "input", "dropout": 0.5}),
    ("parallel_adapter", {"dropout": 0.5}),
    ("ia3", {"side": "input"}),
]
COMPILED = ("ia3+c3a", "lora+sdt", "additional_scan+sdt", "prompt+affix", "lora+memba", "svp+prompt+ia3")
"""Compositions that stand for all where the compiler takes them, which costs a second for each layer."""

COMPILED_WITHIN = {
    **{method: "full" for method in ("linear", "ft", "bitfit")},
    **{method: "ssm" for method in ("a_tuning", "d_tuning", "bias_tuning")},
    **{method: composition for composition in COMPILED for method in composition.split("+")},
}
"""Methods all of whose rules the compiler sees in a larger one or in a composition: the same classes of rules
at the same places."""

COMPOSITIONS: list[tuple[str, dict]] = [
    # Weights of the projectors, added to and multiplied in both orders.
    ("lora+bitfit", {}),
    ("oft+lora", {}),
    ("lora+oft", {}),
    ("ia3+c3a", {}),
    ("cdvft+dora", {}),
    ("prodial+ia3", {}),
    ("full+lora", {}),
    ("strong+bitfit+ia3", {"targets": {"ia3": "dt_proj"}}),
    ("c3a+cdvft+oft", {}),
    ("lora+ft", {"targets": {"lora": "in_proj[x],x_proj[B]", "ft": "conv1d,D"}}),
    # The parameters of the SSM beside the projectors.
    ("lora+sdt", {"targets": {"lora": "out_proj"}}),
    ("sdt+lora", {"targets": {"lora": "x_proj[B],x_proj[C]"}}),
    ("lora+ssm", {}),
    ("lora+a_tuning+d_tuning", {"a_tuning": {"lr_scale": 0.5, "decay_scale": 3.0}}),
    ("bias_tuning+conv1d_tuning+prodial", {}),
    ("lora+additional_scan", {"targets": {"lora": "out_proj"}}),
    ("additional_scan+sdt", {}),
    ("additional_scan+lora+a_tuning", {"targets": {"lora": "x_proj[B]"}}),
    # Tokens and branches in calls of the mixer, of its layers and of the encoder.
    ("lora+prompt", {}),
    ("prompt+affix", {}),
    ("affix+lora+cls_token_tuning", {}),
    ("prompt+pos_embed_tuning+cls_token_tuning", {}),
    ("parallel_adapter+lora", {}),
    ("parallel_adapter+affix+oft", {}),
    ("lora+memba", {}),
    ("memba+affix", {}),
    ("lora+state_offset", {}),
    ("additional_scan+state_offset", {}),
    ("svp+lora", {}),
    ("svp+prompt+ia3", {}),
]
"""Thirty compositions: options and targets by the methods' names.

They cover every method, each kind of place twice over (weights that are called and weights that are read,
rows, calls of the mixer and of the encoder, parameters that grow), and both orders where order matters.
"""


def label(case: tuple[str, dict]) -> str:
    method, extra = case
    return method + "".join(f"-{key}={value}" for key, value in extra.items())


def options_for(method: str, extra: dict) -> dict:
    """`extra`, and of SMALL what the method knows."""
    known = {field for part in method.split("+") for field in options_of(get_method(part))}
    return {**{key: value for key, value in SMALL.items() if key in known}, **extra}
