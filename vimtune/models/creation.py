"""Creating the model that a file or a recipe names, and nothing else that it might ask for."""

from __future__ import annotations

from typing import Any

import timm

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
        ValueError: another name, something that is no option, a value out of range, or sizes that do
            not fit together.
        CheckpointError: there are no published weights, or they cannot be had.
    """
    name = check_model_name(name, what, error)
    checked = check_model_options(name, options, f"{what}: the set of model options", error)
    model: Any = timm.create_model(name, pretrained=pretrained, **checked)
    if not hasattr(model, "creation"):  # models of this package state all their options, resolved
        model.creation = {"name": name, "kwargs": checked}
    return model
