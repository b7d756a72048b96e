"""The base model of an adapter, as the hub knows it."""

from __future__ import annotations

import re
from typing import Any

from vimtune.adapters import AdapterInfo
from vimtune.exchange.local_paths import without_paths
from vimtune.language.registry import LANGUAGE_MODELS
from vimtune.models.weights import weights_of

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
"""The name of a repository: a user or an organisation, and a name."""


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
    # An address in timm may have a revision, too.
    return found if found is not None and REPOSITORY.fullmatch(found) else None


def code_for_base(info: AdapterInfo) -> str:
    """Python that makes `base_model`, the model that an adapter was trained on, for programs that do not read
    that from the adapter file itself."""
    recipe = shared_recipe(info)
    published = bool(recipe.get("pretrained", True)) and not recipe.get("checkpoint")
    if info.model:
        options = {**info.model["kwargs"], "pretrained": published, "num_classes": info.num_classes}
        arguments = ", ".join(
            [repr(info.model["name"]), *(f"{name}={value!r}" for name, value in options.items())]
        )
        lines = [
            "import timm",
            "import vimtune  # which adds its models to those of timm",
            f"base_model = timm.create_model({arguments})",
        ]
        loads = "vimtune.load_checkpoint(base_model, ...)"
    else:
        name = base_on_hub(info) or recipe.get("model") or "..."
        lines = [
            "from transformers import AutoModelForCausalLM",
            f"base_model = AutoModelForCausalLM.from_pretrained({name!r})",
        ]
        loads = "give their folder instead of that name"
    if recipe.get("checkpoint"):
        lines.append(f"# It was trained on weights of its own, {str(recipe['checkpoint'])!r}: {loads}")
    elif not published:
        lines.append("# It was trained on random weights, which are not to be had again")
    return "\n".join(lines)


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
