"""From a wrapper to the model in it.

The record of a model's adapters is kept on the model itself. A wrapper around it has no such record and
must never be taken for a model without adapters: known wrappers are seen through, and whatever else
contains an adapted model is refused.
"""

from __future__ import annotations

import sys

from torch import nn

from vimtune.adapters.slots import adapted_modules, refuse_within_choice

RECORD = "_vimtune_adapters"
"""Attribute of an adapted model under which its adapters are recorded."""

_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel", "DataParallel"): "module",
    ("torch.nn.parallel", "DistributedDataParallel"): "module",
    ("timm.models._features", "FeatureGetterNet"): "model",
}
"""Name of the child that is the model, by the module and the class of the wrapper.

The classes are looked up where they are needed, as some of these modules take seconds to import: a model of a
class whose module is not loaded cannot exist.
"""
_DISTRIBUTED = ("torch.nn.parallel", "DistributedDataParallel")
"""The wrapper that collects its list of parameters once, when it is made."""
_OPAQUE = {
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "it flattens and shards the weights",
    ("torch.jit", "ScriptModule"): "TorchScript has compiled its weights in; use the model it was made from",
}
"""Module and class of the wrappers that cannot be seen through, each with the reason that is shown."""


def unwrap(model: nn.Module, *, retrains: bool = False) -> nn.Module:
    """The model inside known wrappers: torch.compile, DataParallel, DistributedDataParallel and timm's
    features_only. Any other model is returned as it is.

    Args:
        model: a model or a wrapper.
        retrains: whether the caller is about to change which tensors are trained.

    Raises:
        ValueError: `model` contains a model with adapters somewhere below it, or is a part of one, or is
            a wrapper that cannot be seen through; or the present thread is within `using`, and the caller is
            about to change what is trained.
    """
    while (name := _wrapped(model)) is not None:
        if retrains and _is_a(model, _DISTRIBUTED):
            raise ValueError(
                "DistributedDataParallel sums the gradients of those tensors alone that were trained when it "
                "was made: change the adapters of model.module, then wrap that anew"
            )
        model = model.get_submodule(name)
    if RECORD not in vars(model):
        _refuse_hidden_adapters(model)
    elif retrains:
        refuse_within_choice(model)
    return model


def refuse_container(model: nn.Module) -> None:
    """Raise ValueError if `model` has no classification head of its own, but a module inside it has one:
    an adapter belongs on that module, whose head it is to own."""
    if hasattr(model, "get_classifier"):
        return
    for path, module in model.named_modules():
        if hasattr(module, "get_classifier"):
            raise ValueError(
                f"the {type(model).__name__} contains a {type(module).__name__} with a classification head "
                f"at {path!r}: pass that module, or the adapter would freeze its head"
            )


def _wrapped(model: nn.Module) -> str | None:
    return next((child for kind, child in _WRAPPERS.items() if _is_a(model, kind)), None)


def _is_a(model: nn.Module, kind: tuple[str, str]) -> bool:
    module, name = kind
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(model, found)


def refuse_opaque(module: nn.Module) -> None:
    """Raise ValueError if `module` is a wrapper that hides the parameters of the model in it."""
    for kind, reason in _OPAQUE.items():
        if _is_a(module, kind):
            raise ValueError(f"adapters cannot be managed in a model under {kind[1]}: {reason}")


def _refuse_hidden_adapters(model: nn.Module) -> None:
    refuse_opaque(model)
    for path, module in model.named_modules():
        if RECORD in vars(module):
            raise ValueError(
                f"the {type(model).__name__} contains a model with adapters at {path!r}: pass that module"
            )
    if adapted_modules(model):
        raise ValueError(
            f"this {type(model).__name__} is made of parts of a model with adapters: pass the whole model"
        )
