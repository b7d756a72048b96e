"""Creating the model that a file or a recipe names, and nothing else that it might ask for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm

from vimtune.models.checkpoint import pretrained_loading
from vimtune.models.registry import check_model_name, check_model_options


def create_listed_model(
    name: Any,
    options: Any,
    *,
    pretrained: bool = False,
    what: str = "the model",
    error: type[ValueError] = ValueError,
) -> Any:
    """Create a model of the table from values that nobody has checked.

    Args:
        name: one of `vimtune.models.MODELS`; no address of a hub or a folder, nothing else that timm knows.
        options: options of this model, as its schema lists them.
        pretrained: load the weights published for this model, from the address that its package knows.
        what: the file that names the model, for messages.
        error: the class of the error for a wrong name or option.

    Returns:
        The model, an `nn.Module` with timm's interface (`register_model` says what is needed of it). Its
        `creation` says by which name and options it can be created again.

    Raises:
        ValueError: another name, something that is no option, a value out of range, sizes that do not fit
            together, or a model without the interface that `register_model` describes.
        CheckpointError: there are no published weights, or they cannot be had.
    """
    name = check_model_name(name, what, error)
    checked = check_model_options(name, options, f"{what}: the set of model options", error)
    if not timm.is_model(name):
        raise ValueError(
            f"timm does not know the model {name}: its package must register the function of this name with "
            "timm.models.register_model"
        )
    with pretrained_loading(name, pretrained):
        model: Any = timm.create_model(name, pretrained=pretrained, **checked)
    _check_interface(model, name, checked)
    if not hasattr(model, "creation"):  # Models of this package state all their options, resolved.
        model.creation = {"name": name, "kwargs": checked}
    if not hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing = partial(_refuse_grad_checkpointing, name)
    return model


def _check_interface(model: Any, name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that lacks what `register_model` says is needed."""
    missing = [
        item for item in ("get_classifier", "num_classes", "pretrained_cfg") if not hasattr(model, item)
    ]
    if missing:
        raise ValueError(
            f"model {name} has no {', '.join(missing)}: vimtune.models.register_model says what is needed"
        )
    asked = options.get("num_classes", model.num_classes)
    if model.num_classes != asked:
        raise ValueError(
            f"model {name} has num_classes = {model.num_classes} where {asked} was asked for: its "
            "constructor must take num_classes, and keep it as an attribute"
        )
    unsaid = [key for key in ("input_size", "mean", "std") if not model.pretrained_cfg.get(key)]
    if unsaid:
        raise ValueError(
            f"the pretrained_cfg of model {name} lacks {', '.join(unsaid)}: they say how images are prepared"
        )


def _refuse_grad_checkpointing(name: str, enable: bool = True) -> None:
    """Stands in for `set_grad_checkpointing` of a model that has none.

    Raises:
        ValueError: gradient checkpointing is asked for.
    """
    if enable:
        raise ValueError(
            f"model {name} has no set_grad_checkpointing: switch gradient checkpointing off, or "
            "add the method"
        )
