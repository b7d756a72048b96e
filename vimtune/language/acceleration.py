"""Let models of transformers run on our operations: `accelerate` exchanges classes and nothing else."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba.modeling_mamba import MambaMixer, MambaRMSNorm
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, Mamba2RMSNorm

from vimtune.adapters.slots import change_class, plain_class
from vimtune.language.backbones import Mamba2Model, MambaModel
from vimtune.language.mixers import FastMamba2Mixer, FastMambaMixer
from vimtune.language.norms import FastMamba2Norm, FastMambaNorm
from vimtune.language.refusals import guard_against_packing

Model = TypeVar("Model", bound=nn.Module)
"""Any class of modules."""

_FAST_MIXERS: dict[type[nn.Module], type[nn.Module]] = {
    MambaMixer: FastMambaMixer,
    Mamba2Mixer: FastMamba2Mixer,
}
"""Which class takes the place of which mixer."""
_FAST_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    MambaRMSNorm: FastMambaNorm,
    Mamba2RMSNorm: FastMamba2Norm,
}
"""Which class takes the place of which norm; one of somebody else stays as it is."""
_ENCODING_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_mamba.MambaModel: MambaModel,
    modeling_mamba2.Mamba2Model: Mamba2Model,
}
"""Which class takes the place of which model without a head, so that rules can put tokens before a text."""


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Let the Mamba and Mamba-2 mixers of a model of transformers run on our operations, in place.

    The norms before the mixers do so, too, and the models around them offer adapters the call `encode`.
    Packed sequences are refused from then on. Works before and after adapters are injected. The model's own
    class, keys and files stay as they are.

    Args:
        model: a model with mixers of transformers, or several models in one module.
        backend: backend of the operations, see `vimtune.ops`.

    Returns:
        The model, as it was given.

    Raises:
        ValueError: the model has no such mixer, or one with another activation than SiLU or of a class of
            somebody else; the model is then as it was.
    """
    found = [module for module in model.modules() if isinstance(module, MambaMixer | Mamba2Mixer)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no mixer of transformers' Mamba or Mamba-2 to be accelerated"
        )
    for mixer in found:
        if mixer.activation not in ("silu", "swish"):
            raise ValueError(f"hidden_act = {mixer.activation!r}: only mixers with 'silu' can be accelerated")
        if plain_class(mixer) not in (*_FAST_MIXERS, *_FAST_MIXERS.values()):
            raise ValueError(f"{type(mixer).__name__} changes transformers' mixer and cannot be accelerated")
    classes = _FAST_MIXERS | _FAST_NORMS
    for module in model.modules():
        kind = plain_class(module)
        if kind in classes or kind in classes.values():
            change_class(module, classes.get(kind, kind))
            module.backend = backend  # type: ignore[assignment]  # the fast classes have it
        elif kind in _ENCODING_MODELS:
            change_class(module, _ENCODING_MODELS[kind])
    guard_against_packing(model)
    return model
