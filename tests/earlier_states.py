"""States of runs as versions wrote them that did not hold all options of a method."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def forget_options(checkpoint: Path) -> None:
    """Make of a state one whose recipe states no option in `peft_kwargs`, and which does not hold any."""
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    recipe = json.dumps(json.loads(metadata["recipe"]) | {"peft_kwargs": {}})
    facts = json.dumps(json.loads(metadata["facts"]) | {"methods": {}})
    save_file(load_file(checkpoint), checkpoint, {**metadata, "recipe": recipe, "facts": facts})
