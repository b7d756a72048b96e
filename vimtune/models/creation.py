"""Creating the model that a file or a recipe names, and nothing else that it might ask for."""

from __future__ import annotations

from typing import Any, cast

import timm

from vimtune.model_options import check_model_name, check_model_options
from vimtune.models.vim import VisionMamba


def create_listed_model(
    name: Any,
    options: Any,
    *,
    pretrained: bool = False,
    what: str = "the model",
    error: type[ValueError] = ValueError,
) -> VisionMamba:
    """Create one of this package's models from values that nobody has checked.

    Args:
        name: one of `catalog.MODELS`; no address of a hub or a folder, no model of another package.
        options: arguments of `VisionMamba` as `vimtune.model_options` lists them.
        pretrained: load the weights published for this model, from the address that the package knows.
        what: the file that names the model, for messages.
        error: the class of the error for a wrong name or option.

    Raises:
        ValueError: another name, something that is no option, a value out of range, or sizes that do
            not fit together.
        CheckpointError: there are no published weights, or they cannot be had.
    """
    name = check_model_name(name, what, error)
    checked = check_model_options(options, f"{what}: the set of model options", error)
    return cast(VisionMamba, timm.create_model(name, pretrained=pretrained, **checked))
