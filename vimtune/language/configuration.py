"""From a name or a file to the configuration of a model, in the two layouts that are in use.

transformers' `config.json` says its `model_type`. That of the original code (package mamba_ssm) has the
fields of `mamba_ssm.models.config_mamba.MambaConfig` instead. Both may come from anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Le
from transformers import Mamba2Config, MambaConfig, PreTrainedConfig
from typing_extensions import TypedDict  # typing's own is not enough for pydantic before Python 3.12

from vimtune import schema
from vimtune.language.registry import BYTE_VOCABULARY, Family, LanguageModelEntry, mamba2_heads
from vimtune.text import quote, suggest

CONFIGS: dict[str, Any] = {"mamba": MambaConfig, "mamba2": Mamba2Config}
"""transformers' classes by family."""

END_OF_TEXT = 0
"""The token <|endoftext|> of the published models, which begins, ends and pads a text."""

Width = Annotated[int, Ge(1), Le(2**16)]
"""A number of channels or states."""
Layers = Annotated[int, Ge(1), Le(4096)]
"""A number of layers."""
Vocabulary = Annotated[int, Ge(1), Le(2**24)]
"""A number of tokens that a model knows."""


class Sizes(TypedDict, total=False):
    """Ranges of what determines how large a model is; within them no file can ask for endless work."""

    hidden_size: Width
    num_hidden_layers: Layers
    vocab_size: Vocabulary
    state_size: Width
    expand: Annotated[int, Ge(1), Le(64)]
    conv_kernel: Annotated[int, Ge(1), Le(64)]
    time_step_rank: Width | Literal["auto"]
    num_heads: Width
    head_dim: Width
    n_groups: Width
    chunk_size: Width


Sizes.__pydantic_config__ = schema.STRICT  # type: ignore[attr-defined]


@dataclass(frozen=True)
class OriginalLayer:
    """`ssm_cfg` of the original configuration: arguments of its layers, of which those that concern kernels
    or initial values have no meaning here."""

    __pydantic_config__: ClassVar[Any] = schema.STRICT

    layer: Literal["Mamba1", "Mamba2"] = "Mamba1"
    d_state: Width | None = None
    d_conv: Width = 4
    expand: Width = 2
    dt_rank: Width | Literal["auto"] = "auto"
    headdim: Width = 64
    ngroups: Width = 1
    chunk_size: Width = 256
    bias: bool = False
    conv_bias: bool = True
    dt_min: float | None = None
    dt_max: float | None = None
    dt_init: str | None = None
    dt_scale: float | None = None
    dt_init_floor: float | None = None
    dt_limit: tuple[float, float] | None = None
    A_init_range: tuple[float, float] | None = None
    use_fast_path: bool | None = None
    use_mem_eff_path: bool | None = None
    rmsnorm: Literal[True] = True
    norm_before_gate: Literal[False] = False
    D_has_hdim: Literal[False] = False


@dataclass(frozen=True)
class OriginalConfig:
    """`config.json` of the original code. Hybrids with attention or with MLPs are other models."""

    __pydantic_config__: ClassVar[Any] = schema.STRICT

    d_model: Width
    n_layer: Layers
    vocab_size: Vocabulary
    d_intermediate: Literal[0] = 0
    ssm_cfg: OriginalLayer = field(default_factory=OriginalLayer)
    attn_layer_idx: list[int] | None = None
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: Literal[True] = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: Annotated[int, Ge(1), Le(2**16)] = 8
    tie_embeddings: bool = True


def config_of_entry(entry: LanguageModelEntry, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model of the table, with changes.

    Raises:
        ValueError: a change of a field that there is not, or a value out of range.
    """
    end = END_OF_TEXT if entry.sizes["vocab_size"] != BYTE_VOCABULARY else 256
    return make_config(
        {"model_type": entry.family, **_ends(end), **entry.sizes}, changes, f"model {entry.name}"
    )


def config_of_file(values: Any, changes: Mapping[str, Any], what: str) -> PreTrainedConfig:
    """The configuration that a `config.json` states, with changes.

    Args:
        values: what the file holds, in either layout.
        changes: fields of transformers' configuration that take other values.
        what: the file, for messages.

    Raises:
        ValueError: another architecture, fields that are missing or out of range, or a change of a field that
            there is not.
    """
    if isinstance(values, dict) and "model_type" not in values and "d_model" in values:
        values = _from_original(schema.check(OriginalConfig, values, what), what)
    return make_config(values, changes, what)


def make_config(values: Any, changes: Mapping[str, Any], what: str) -> PreTrainedConfig:
    """transformers' configuration of values that nobody has checked, with changes.

    Raises:
        ValueError: another architecture, a value out of range, or a change of a field that there is not.
    """
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in CONFIGS:
        found = "has no model_type" if family is None else f"is for a model of type {quote(family)}"
        raise ValueError(f"{what} {found}; expected one of {', '.join(get_args(Family))}")
    known = CONFIGS[family]().to_dict()
    for key in changes:
        if key not in known:
            raise ValueError(f"{what}: {family} has no option {quote(key)}.{suggest(key, known)}")
    values = {**values, **changes}
    schema.check(Sizes, {name: values[name] for name in Sizes.__annotations__ if name in values}, what)
    try:
        config: PreTrainedConfig = CONFIGS[family].from_dict(values)
    except Exception as error:  # whatever transformers' validation raises: classes of several packages
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} is no configuration of {family}: {quote(reason)}") from error
    return config


def _from_original(original: OriginalConfig, what: str) -> dict[str, Any]:
    """The same in transformers' words. Vocabularies are padded, as the original code does when it builds."""
    if original.attn_layer_idx:
        raise ValueError(f"{what} has layers of attention (attn_layer_idx); expected layers of Mamba alone")
    layer = original.ssm_cfg
    multiple = original.pad_vocab_size_multiple
    values: dict[str, Any] = {
        "hidden_size": original.d_model,
        "num_hidden_layers": original.n_layer,
        "vocab_size": -(-original.vocab_size // multiple) * multiple,
        "conv_kernel": layer.d_conv,
        "expand": layer.expand,
        "use_bias": layer.bias,
        "use_conv_bias": layer.conv_bias,
        "residual_in_fp32": original.residual_in_fp32,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": original.tie_embeddings,
        **_ends(END_OF_TEXT),
    }
    if layer.layer == "Mamba1":
        return {
            "model_type": "mamba",
            **values,
            "state_size": layer.d_state or 16,
            "time_step_rank": layer.dt_rank,
        }
    limit = {} if layer.dt_limit is None else {"time_step_limit": layer.dt_limit}
    return {
        "model_type": "mamba2",
        **values,
        **limit,
        "state_size": layer.d_state or 128,
        "n_groups": layer.ngroups,
        "head_dim": layer.headdim,
        "num_heads": mamba2_heads(original.d_model, layer.expand, layer.headdim),
        "chunk_size": layer.chunk_size,
    }


def _ends(token: int) -> dict[str, int]:
    return {"bos_token_id": token, "eos_token_id": token, "pad_token_id": token}
