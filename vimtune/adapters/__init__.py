"""Parameter-efficient methods as rules for effective weights; see `rule.py` for the idea.

Adding a method is one new file with a registered class (`lora.py` is the pattern) and one line here.
"""

# The modules are imported in the order in which `--list` shows their methods.
from vimtune.adapters import prodial, lora, dora, bitfit, linear, full, ft, strong  # noqa: F401, I001
from vimtune.adapters.base import Method, get_method, list_methods, method_fields, register_method
from vimtune.adapters.batched import shared_effective_weights
from vimtune.adapters.identity import (
    BaseIdentity,
    base_hash,
    base_identity,
    has_base,
    made_from,
    note_casts,
    note_loading,
    note_seed,
)
from vimtune.adapters.info import FORMAT as ADAPTER_FORMAT
from vimtune.adapters.info import AdapterFileError, AdapterInfo
from vimtune.adapters.manage import (
    active_adapter,
    delete_adapter,
    disabled,
    head_has_rules,
    inject,
    list_adapters,
    merge,
    set_adapter,
)
from vimtune.adapters.rule import WeightRule, base_parameters
from vimtune.adapters.store import load_adapter, read_adapter_info, save_adapter
from vimtune.adapters.tensors import (
    AdaptedParameter,
    AdapterSummary,
    DeadAdapterError,
    adapter_parameters,
    adapter_state_dict,
    check_gradients,
    load_adapter_state_dict,
    summary,
)

__all__ = [
    "ADAPTER_FORMAT",
    "AdaptedParameter",
    "AdapterFileError",
    "AdapterInfo",
    "AdapterSummary",
    "BaseIdentity",
    "DeadAdapterError",
    "Method",
    "WeightRule",
    "active_adapter",
    "adapter_parameters",
    "adapter_state_dict",
    "base_hash",
    "base_identity",
    "base_parameters",
    "check_gradients",
    "delete_adapter",
    "disabled",
    "get_method",
    "has_base",
    "head_has_rules",
    "inject",
    "list_adapters",
    "list_methods",
    "load_adapter",
    "load_adapter_state_dict",
    "made_from",
    "merge",
    "method_fields",
    "note_casts",
    "note_loading",
    "note_seed",
    "read_adapter_info",
    "register_method",
    "save_adapter",
    "set_adapter",
    "shared_effective_weights",
    "summary",
]
