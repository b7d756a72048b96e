"""The base model of an adapter, as the hub knows it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from vimtune.adapters import AdapterInfo
from vimtune.exchange.local_paths import without_paths
from vimtune.language.registry import LANGUAGE_MODELS
from vimtune.models.weights import weights_of


def shared_recipe(info: AdapterInfo) -> dict[str, Any]:
    """The recipe in an adapter file, without paths of this computer; empty where there is none."""
    recipe = info.extra.get("recipe", {})
    return without_paths(recipe) if isinstance(recipe, dict) else {}


def base_on_hub(info: AdapterInfo) -> str | None:
    """The repository of the weights that an adapter was trained on; None where they are no published ones.

    The hub links it, so the name of a model in timm or here is none: of our own weights, which come with
    vimtune, of random ones and of those in a file there is no repository.
    """
    recipe = shared_recipe(info)
    name = info.model.get("name") if info.model else recipe.get("model")
    if not isinstance(name, str) or recipe.get("checkpoint") or not recipe.get("pretrained", True):
        return None
    found = _of_images(name) if info.model else _of_texts(name)
    try:
        validate_repo_id(found or "")
    except HFValidationError:  # An address in timm may have a revision, too.
        return None
    return found


def _of_images(name: str) -> str | None:
    """The repository of the weights that a model of images has by itself."""
    if weights_of(name) is not None:
        return None
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    return None if config is None else config.hf_hub_id


def _of_texts(name: str) -> str | None:
    """The repository of a language model of the table, or one that is named itself."""
    if name in LANGUAGE_MODELS:
        return LANGUAGE_MODELS.get(name).hub_id
    return name if "/" in name else None
