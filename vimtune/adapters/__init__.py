"""Adapters on a model: the protocol of rules (`rule.py`), where they go (`sites.py`), and what is done with
them.

The methods, which choose sites and build rules, are in `vimtune.methods`.
"""

from vimtune.adapters.arithmetic import combine
from vimtune.adapters.batched import shared_effective_weights
from vimtune.adapters.continuing import start_from
from vimtune.adapters.folding import merge, unmerge
from vimtune.adapters.identity import (
    BaseIdentity,
    base_hash,
    base_identity,
    has_base,
    has_replaced,
    made_from,
    note_casts,
    note_loading,
    note_seed,
    replaced_identity,
    replaced_paths,
    share_sources,
)
from vimtune.adapters.info import FORMAT as ADAPTER_FORMAT
from vimtune.adapters.info import AdapterFileError, AdapterInfo, OtherBaseError
from vimtune.adapters.manage import (
    active_adapter,
    delete_adapter,
    disabled,
    has_call_rules,
    head_has_rules,
    inject,
    list_adapters,
    set_adapter,
)
from vimtune.adapters.mixing import forward_mixed, using
from vimtune.adapters.parts import TextPart
from vimtune.adapters.rule import CallRule, Rule, WeightRule, each_tensor
from vimtune.adapters.settling import TrainingBatches, settle, settles
from vimtune.adapters.simplifying import simplify
from vimtune.adapters.sites import Site
from vimtune.adapters.slots import base_parameters
from vimtune.adapters.store import load_adapter, read_adapter, read_adapter_info, save_adapter
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
from vimtune.methods import Method, get_method, list_methods, register_method

__all__ = [
    "ADAPTER_FORMAT",
    "AdaptedParameter",
    "AdapterFileError",
    "AdapterInfo",
    "AdapterSummary",
    "BaseIdentity",
    "CallRule",
    "DeadAdapterError",
    "Method",
    "OtherBaseError",
    "Rule",
    "Site",
    "TextPart",
    "TrainingBatches",
    "WeightRule",
    "active_adapter",
    "adapter_parameters",
    "adapter_state_dict",
    "base_hash",
    "base_identity",
    "base_parameters",
    "check_gradients",
    "combine",
    "delete_adapter",
    "disabled",
    "each_tensor",
    "forward_mixed",
    "get_method",
    "has_base",
    "has_call_rules",
    "has_replaced",
    "head_has_rules",
    "inject",
    "list_adapters",
    "list_methods",
    "load_adapter",
    "load_adapter_state_dict",
    "made_from",
    "merge",
    "note_casts",
    "note_loading",
    "note_seed",
    "read_adapter",
    "read_adapter_info",
    "register_method",
    "replaced_identity",
    "replaced_paths",
    "save_adapter",
    "set_adapter",
    "settle",
    "settles",
    "share_sources",
    "shared_effective_weights",
    "simplify",
    "start_from",
    "summary",
    "unmerge",
    "using",
]
