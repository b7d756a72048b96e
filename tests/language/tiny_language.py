"""Small language models: transformers' own, ours, and the original layout of their files."""

from __future__ import annotations

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from vimtune.language import accelerate  # noqa: E402

VOCABULARY = 56
FAMILIES = ("mamba", "mamba2")
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8, **_ENDS}
_HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8, "tie_word_embeddings": True}


def slow_model(family: str, **changes):
    """transformers' own, with weights that make every part matter."""
    torch.manual_seed(0)
    if family == "mamba":
        config = transformers.MambaConfig(**{**_SIZES, **changes})
        model = transformers.MambaForCausalLM(config).eval()
    else:
        config = transformers.Mamba2Config(**{**_SIZES, **_HEADS, **changes})
        model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.add_(3)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith(("x_proj.weight", "in_proj.weight")):
                parameter.mul_(5)
    return model


def both_models(family: str, **changes):
    """transformers' own model and the same one on our operations."""
    slow = slow_model(family, **changes)
    return slow, accelerate(copy.deepcopy(slow))


def tokens(rows: int = 3, length: int = 21):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def cache_of(output):
    """The cache of an output, which has another name in transformers before 5.24."""
    return output.cache if "cache" in output else output.cache_params


def cached(model, ids, cache=None, **arguments):
    """Logits and cache after `ids` behind `cache`."""
    name = "cache" if transformers.__version__ >= "5.24" else "cache_params"
    output = model(ids, **{name: cache}, use_cache=True, **arguments)
    return output.logits, cache_of(output)


def original_files(model, folder, weights="pytorch_model.bin", **changes):
    """Write a model as the package mamba_ssm does; returns the file of weights."""
    config, first = model.config, model.config.model_type == "mamba"
    layer = {"layer": "Mamba1" if first else "Mamba2", "d_state": config.state_size}
    if not first:
        layer |= {"headdim": config.head_dim, "ngroups": config.n_groups, "chunk_size": config.chunk_size}
    values = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": layer,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    state = {
        name.replace("embeddings", "embedding"): x.detach().clone() for name, x in model.state_dict().items()
    }
    path = folder / weights
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path
