"""Every registered method, in the forms that the tests go through, on models small enough for them."""

from __future__ import annotations

from vimtune.fields import options_of
from vimtune.methods import get_method, list_methods
from vimtune.testing.methods import disturb

__all__ = ["CASES", "SMALL", "disturb", "label", "options_for"]

# Options small enough for test_vim, whose narrowest target is 16 wide.
SMALL = {"rank": 3, "block_size": 4, "num_tokens": 3, "num_states": 2, "width": 3}
CASES = [
    *((name, {}) for name in list_methods()),
    ("prodial", {"variant": "paper"}),
    ("prodial", {"block_size": 1}),
    ("lora+bitfit", {}),
    ("full+lora", {}),
    ("lora+dora", {"dora": {"dropout": 0.5}}),
    ("lora", {"dropout": 0.5}),
    ("dora", {"dropout": 0.5}),
    ("prodial", {"dropout": 0.5}),
    ("prompt", {"hidden": 3}),
    ("affix", {"hidden": 3}),
    ("state_offset", {"kind": "y"}),
    ("state_offset", {"h_rank": 2}),
    ("lora+memba", {}),
    ("additional_scan+lora+affix+prompt", {}),
]


def label(case: tuple[str, dict]) -> str:
    method, extra = case
    return method + "".join(f"-{key}={value}" for key, value in extra.items())


def options_for(method: str, extra: dict) -> dict:
    """`extra`, and of SMALL what the method knows."""
    known = {field for part in method.split("+") for field in options_of(get_method(part))}
    return {**{key: value for key, value in SMALL.items() if key in known}, **extra}
